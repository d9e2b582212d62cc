"""`--submit`: the engine's own command, if it is there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

from plait.errors import PlaitError, RequestError
from plait.jobs.request import Engine, Request, Submit

__all__ = ["start"]


def start(engine: Engine, submit: Submit, request: Request) -> None:
    """Run the engine's own command, its output on stderr.

    Raises:
        RequestError: it is not installed here.
        PlaitError: it ended with another status than 0.
    """
    first, *rest = submit.words
    program = submit.program or first
    found = sys.executable if first == "python" else shutil.which(first)
    missing = ""
    if found is None or (first != "python" and shutil.which(program) is None):
        missing = program
    elif submit.module and not _has_module(submit.module):
        missing = submit.module
    if missing or found is None:
        raise RequestError(
            f"launch: {missing} is not installed here, so the job was not started (its files are written)",
            hint=f"{submit.install}; then: {submit.text}",
        )
    if unset := [name for name in submit.variables if not os.environ.get(name)]:
        raise RequestError(
            f"launch: {' and '.join(unset)} {'are' if len(unset) > 1 else 'is'} not set, so the job was not started "
            "(its files are written)",
            hint=f"{submit.install}; then: {' '.join(f'{name}=...' for name in unset)} {submit.text}",
        )
    if engine.name == "torchrun" and request.nodes > 1 and not request.hosts:
        raise RequestError(
            f"launch: the {request.nodes} hosts are not known, so the job was not started (its files are written)",
            hint="pass --hosts A,B,... in the order of their numbers",
        )
    done = subprocess.run([found, *rest], cwd=request.root, stdout=2, check=False)  # what it prints is no result
    if done.returncode != 0:
        raise PlaitError(f"launch: `{submit.text}` ended with status {done.returncode}", hint="its own output is above")


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
