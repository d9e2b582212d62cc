"""Running a script in an environment of its own: JSON in, JSON out, both by file, under a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.environments.make import find
from plait.environments.names import wanted
from plait.errors import PlaitError, WorkerError

__all__ = ["run_in"]

_LARGEST_REPLY = 64 << 20  # bytes; tensors travel in files of their own


def run_in(
    name: str,
    script: Path,
    request: Mapping[str, Any],
    *,
    time_limit: float,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `script REQUEST.json REPLY.json` replies, run by the interpreter of environment `name`.

    The script gets nothing of this process but the file (isolated mode: neither PYTHONPATH nor user packages). A reply
    with the key "error" is the script's own account of what it could not do. Nothing is unpickled.

    Raises:
        RequestError: the environment is not made.
        PlaitError: the script says "error"; the message is its first line.
        WorkerError: it crashed, took longer than `time_limit` seconds (it and what it started are ended), or left no reply.
    """
    python = find(name)
    surroundings = {**os.environ, **dict(wanted(name).variables), **(variables or {})}
    with tempfile.TemporaryDirectory(prefix=f"plait-{name}-") as folder:
        asked, reply = Path(folder, "request.json"), Path(folder, "reply.json")
        asked.write_text(json.dumps(dict(request)), encoding="utf-8")
        log = Path(folder, "log.txt")
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [str(python), "-I", str(script), str(asked), str(reply)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=surroundings,
                cwd=folder,
                start_new_session=True,
            )
            try:
                status = process.wait(time_limit)
            except subprocess.TimeoutExpired:
                raise WorkerError(
                    f"environment {name}: {script.stem} took longer than {time_limit:.0f} s and was ended"
                ) from None
            finally:
                _end(process)
        found = _read(reply)
        if found is None or (status != 0 and "error" not in found):
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            last = _last_line(log)
            raise WorkerError(f"environment {name}: {script.stem} {how}" + (f"\n\n  {last}" if last else ""))
    if "error" in found:
        raise PlaitError(f"{script.stem}: {str(found['error'])[:2000]}", hint=str(found.get("hint", "")))
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the script's own session."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it ended by itself just now
        process.wait()


def _read(file: Path) -> dict[str, Any] | None:
    try:
        if file.stat().st_size > _LARGEST_REPLY:
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
