"""Children: one process for each backend, with a time limit, ended with everything it started; crashes stay there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import plait
from plait.serve.child import Request

__all__ = ["environment_of", "run_child"]


def run_child(
    request: Request, interpreter: str, *, limit: float, tell: Callable[[str], None] = lambda stage: None
) -> dict[str, Any]:
    """What the child's result file says in the end; a crash or the end of its time is a result like any other.

    `tell` is given each stage as it begins.
    """
    with tempfile.TemporaryDirectory(prefix="plait-child-", dir=Path(request.result).parent) as text:
        folder = Path(text)
        asked, log = folder / "request.json", folder / "log.txt"
        asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
        result = Path(request.result)
        result.unlink(missing_ok=True)
        with log.open("wb") as output:
            child = subprocess.Popen(
                [interpreter, "-m", "plait.serve.child", str(asked)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment_of(interpreter, folder), "OMP_NUM_THREADS": str(max(request.threads))},
                start_new_session=True,
            )
            try:
                over = _wait(child, result, limit, tell)
            finally:
                _end(child)
        values = _read(result)
        if over or values.get("status") == "crashed":
            values["status"] = "failed"
            values["error"] = _how_it_ended(child.returncode, values.get("stage", "starting"), limit if over else None)
            values["detail"] = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        return values


def environment_of(interpreter: str, folder: Path) -> dict[str, str]:
    """The variables of a child in `interpreter`: this process's, and where it finds plait.

    `folder`: one to write into, for a child in another environment.
    """
    environment = dict(os.environ)
    # Else the first thread that computes would be tied to one core, and a runtime's own threads with it.
    environment.pop("KMP_AFFINITY", None)
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment["PYTHONWARNINGS"] = "ignore"
    # They are CUDA's, and these children compute on CPUs.
    environment.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if interpreter == sys.executable:
        # The child finds what this process finds, the user's own modules too.
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, sys.path)))
    else:
        environment["PYTHONPATH"] = str(_plait_alone(folder))
        environment.pop("PYTHONHOME", None)
    return environment


def _plait_alone(folder: Path) -> Path:
    """A folder with plait and none of its neighbours: another environment has packages of its own.

    With its metadata, because backends are found by entry points.
    """
    alone = folder / "plait-alone"
    info = alone / f"plait-{plait.__version__}.dist-info"
    info.mkdir(parents=True)
    (alone / "plait").symlink_to(Path(plait.__file__).resolve().parent)
    own = metadata.distribution("plait")
    for name in ("METADATA", "entry_points.txt"):
        (info / name).write_text(own.read_text(name) or "", encoding="utf-8")
    return alone


def _wait(child: subprocess.Popen[bytes], result: Path, limit: float, tell: Callable[[str], None]) -> bool:
    """Whether the limit was passed."""
    stop, stage = time.monotonic() + limit, ""
    while child.poll() is None:
        if time.monotonic() > stop:
            return True
        now = _read(result).get("stage", "")
        if now and now != stage:
            stage = now
            tell(stage)
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.1)
    return False


def _read(result: Path) -> dict[str, Any]:
    try:
        values = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"status": "crashed", "stage": "starting"}
    return values if isinstance(values, dict) else {"status": "crashed", "stage": "starting"}


def _end(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _how_it_ended(status: int | None, stage: str, limit: float | None) -> str:
    if limit is not None:
        return f"stopped after its time limit of {limit:.0f} s while {stage} (--limit raises it)"
    if status is not None and status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        more = ": probably out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name} while {stage}{more}"
    return f"its process ended with status {status} while {stage}"
