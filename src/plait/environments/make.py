"""Making an environment of its own, whole or not at all.

<cache>/plait/environments/.litert-1a2b3c.4711     while pip works; its process's number at the end
<cache>/plait/environments/litert-1a2b3c           renamed to this once everything in it imports
                             environment.json      written before the rename: versions, size, date
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plait.environments.names import COMMAND, Environment, every, root, wanted
from plait.errors import PlaitError, RequestError

__all__ = ["ensure", "find", "installed", "make", "remove"]

_RECORD = "environment.json"
_TIME_LIMIT = 3600.0  # seconds for pip; the largest took 4 minutes on two cores with a near mirror


def find(name: str) -> Path:
    """The interpreter of a made environment.

    Raises:
        RequestError: it is not made; the hint is the command that makes it.
    """
    environment = wanted(name)
    if not (environment.folder / _RECORD).is_file() or not environment.python.exists():
        raise RequestError(f"environment {name} is not there ({environment.purpose})", hint=f"{COMMAND} {name}")
    return environment.python


def ensure(name: str, *, python: str | None = None, say: Callable[[str], None] | None = None) -> Path:
    """The interpreter of an environment, made first if it is not there (which downloads).

    Raises:
        RequestError: as `make`.
        PlaitError: as `make`.
    """
    try:
        return find(name)
    except RequestError:
        return make(name, python=python, say=say)


def make(
    name: str, *, python: str | None = None, time_limit: float = _TIME_LIMIT, say: Callable[[str], None] | None = None
) -> Path:
    """Make an environment with pip, from the index that pip is set up for, and give its interpreter.

    An environment that is there already is replaced only once the new one is whole. Torch, where it is needed, is of
    the same release and build (`+cpu`, say) as the one that runs here.

    Raises:
        RequestError: no such environment, or its packages are not published for this Python.
        PlaitError: pip could not get or install a package, or what it installed does not import. Nothing is left.
    """
    environment = wanted(name)
    interpreter = python or sys.executable
    _check_python(environment, interpreter)
    root().mkdir(parents=True, exist_ok=True)
    _sweep(environment)
    partial = root() / f".{environment.folder.name}.{os.getpid()}"
    begin = time.monotonic()
    try:
        _fill(environment, partial, interpreter, time_limit, say or (lambda _: None))
        _put_in_place(partial, environment.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if say is not None:
        say(f"made in {time.monotonic() - begin:.0f} s: {environment.folder}")
    return environment.python


def installed() -> list[dict[str, Any]]:
    """One record for each environment there is: name, purpose, path, made, size_gib, python, versions of what is pinned."""
    found = []
    for environment in every():
        try:
            record = json.loads((environment.folder / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not made
            record = {}
        made = bool(record) and environment.python.exists()
        row = {"name": environment.name, "purpose": environment.purpose, "made": made}
        found.append({**record, **row, "path": str(environment.folder) if made else None})
    return found


def remove(name: str) -> bool:
    """Delete an environment, those of earlier pinned versions as well; whether there was one."""
    environment = wanted(name)
    folders = [f for f in root().glob(f"{environment.name}-*") if f.is_dir()] if root().is_dir() else []
    for folder in folders:
        shutil.rmtree(folder)
    return bool(folders)


def _check_python(environment: Environment, interpreter: str) -> None:
    try:
        shown = _output([interpreter, "-c", "import sys; print(*sys.version_info[:2])"], 60.0)
        version = tuple(int(part) for part in shown.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        raise RequestError(f"--python {interpreter}: not a Python interpreter that starts") from None
    low, high = environment.pythons
    if not low <= version <= high:
        raise RequestError(
            f"environment {environment.name}: its packages are published for Python {low[0]}.{low[1]} to "
            f"{high[0]}.{high[1]}, this is {'.'.join(map(str, version))}",
            hint=f"{COMMAND} {environment.name} --python PATH, with the path of such an interpreter",
        )


def _fill(
    environment: Environment, partial: Path, interpreter: str, time_limit: float, say: Callable[[str], None]
) -> None:
    say(f"environment {environment.name}: pip installs {', '.join(_pinned(environment))} ...")
    _checked([interpreter, "-m", "venv", str(partial)], environment, 300.0)
    python = str(partial / environment.python.relative_to(environment.folder))
    constraints = partial / "constraints.txt"
    constraints.write_text(_constraints(environment), encoding="utf-8")
    command = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--requirement", str(environment.requirements), "--constraint", str(constraints)]
    _checked(command, environment, time_limit)
    imports = "; ".join(f"import {module}" for module in environment.modules)
    _checked([python, "-c", imports], environment, 600.0, dict(environment.variables))
    listed = json.loads(
        _output([python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"], 120.0)
    )
    pinned = _pinned(environment)
    record = {
        "python": _output([python, "-c", "import platform; print(platform.python_version())"], 60.0).strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "size_gib": round(sum(f.stat().st_size for f in partial.rglob("*") if f.is_file()) / 2**30, 2),
        "versions": {_plain(item["name"]): item["version"] for item in listed if _plain(item["name"]) in pinned},
    }
    (partial / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _pinned(environment: Environment) -> list[str]:
    lines = environment.requirements.read_text(encoding="utf-8").splitlines()
    return [line.partition("==")[0] for line in lines if line.strip() and not line.startswith("#")]


def _plain(name: str) -> str:
    """A package's name as PyPA compares them: small letters, hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _constraints(environment: Environment) -> str:
    """The build of torch that runs here: left to itself, pip may bring the CUDA build beside a CPU one."""
    if "torch" not in _pinned(environment):
        return ""
    try:
        here = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""
    pinned = re.search(r"^torch==(\S+)$", environment.requirements.read_text(encoding="utf-8"), re.MULTILINE)
    # Another release here than the pinned one: only the pin holds.
    return f"torch=={here}\n" if pinned and here.partition("+")[0] == pinned.group(1) else ""


def _put_in_place(partial: Path, folder: Path) -> None:
    old = partial.with_name(f"{partial.name}.old")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sweep(environment: Environment) -> None:
    """Remove what makers that were killed have left half-made."""
    for folder in root().glob(f".{environment.name}-*"):
        number = re.search(r"\.(\d+)(\.old)?$", folder.name)
        if number and not _is_alive(int(number.group(1))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _output(command: list[str], limit: float) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit).stdout


def _checked(
    command: list[str], environment: Environment, limit: float, variables: dict[str, str] | None = None
) -> None:
    """Run a step of the making, or say in two lines why it failed."""
    what = f"environment {environment.name}"
    surroundings = {**os.environ, "PYTHONNOUSERSITE": "1", **(variables or {})}
    surroundings.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=surroundings, check=False)
    except subprocess.TimeoutExpired:
        raise PlaitError(
            f"{what}: took longer than {limit:.0f} s and was stopped; nothing was kept",
            hint="raise --time-limit, or look at the network",
        ) from None
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message")
    if "pip" in command:
        message = f"{what}: pip could not install it; nothing was kept"
        hint = "packages come from the index that pip is set up for: is it reachable from here, and does it have them?"
    else:
        message, hint = f"{what}: it was installed but does not work; nothing was kept", ""
    raise PlaitError(f"{message}\n\n  {reason[:300]}", hint=hint)
