"""A run that is stopped, or loses a process, ends soon, leaves no process behind and nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.multi

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A training of two processes that goes on for long, after its first steps."""
    process = _start(tmp_path)
    try:
        _wait_for_steps(process, tmp_path)
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def _start(run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "plait", "train", "examples/digits.py:job", "--devices", "2", "--plan", "dp=2"]
    return subprocess.Popen(
        [*command, "--steps", "1000000", "--checkpoint-every", "20", "--run-dir", str(run_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and what they start inherits that: as in a terminal here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  it only sets a signal
    )


def _wait_for_steps(process: subprocess.Popen[str], run_dir: Path) -> None:
    log = run_dir / "log.jsonl"
    until = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") > 25):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.2)


def _children(pid: int) -> list[int]:
    """Worker processes of a run (multiprocessing's resource tracker is none)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_bytes()
            except (OSError, ValueError):
                continue
            if parent == pid and b"spawn_main" in words:
                found.append(int(entry.name))
    return found


def _gone(pids: list[int], within: float = 10.0) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_interrupted(started: subprocess.Popen[str], tmp_path: Path) -> None:
    """Ctrl-C: status 130, no traceback, no orphan; log and last checkpoint can be read."""
    workers = _children(started.pid)
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=30)

    assert started.returncode == 130
    assert "Traceback" not in errors
    assert len(workers) == 2
    assert _gone(workers)
    assert all(json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    from plait.run.checkpoint import latest

    assert latest(tmp_path) is not None


def test_a_process_dies(started: subprocess.Popen[str]) -> None:
    """The other one is ended within 30 seconds, and the message says which died and how."""
    workers = _children(started.pid)
    begin = time.monotonic()
    os.kill(workers[1], signal.SIGKILL)
    _, errors = started.communicate(timeout=60)

    assert time.monotonic() - begin < 30
    assert started.returncode == 1
    assert "was ended by signal SIGKILL" in errors
    assert _gone(workers)


def test_no_orphans_when_the_command_is_killed(started: subprocess.Popen[str]) -> None:
    """Even if nothing could be told to the processes, they end."""
    workers = _children(started.pid)
    started.kill()
    started.communicate(timeout=30)

    assert _gone(workers)
