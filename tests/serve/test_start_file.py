"""serve.sh starts a server's processes with the threads and cores of this computer's placement, run for real by bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plait.serve.start_file import NAME, start_file

ROWS = [{"status": "failed"}, {"status": "ok", "folder": "exports/m/onnxruntime"}]
TUNED = {
    "folder": "exports/m/openvino",
    "environment": {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_CPU_AFFINITY": "0 1"},
}


def run(folder: Path, text: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / NAME).write_text(text)
    own = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    return subprocess.run(
        ["bash", str(folder / NAME), *command],
        env={**own, "PYTHON": sys.executable, "PLAIT_CACHE": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def show(variable: str) -> tuple[str, str, str]:
    return "sh", "-c", f'echo "$PLAIT_INDEX ${variable} $(taskset -p $$ 2>/dev/null | cut -d: -f2)"'


def text(tuned: dict[str, Any] | None = None) -> str:
    return start_file("m", Path("exports/m"), ROWS, tuned)


def test_it_says_how_to_load_and_what_was_chosen() -> None:
    """Readable: the artefact, the threads and cores of one, two and four processes, and why."""
    plain, tuned = text(), text(TUNED)

    assert 'plait.serve.load("exports/m/onnxruntime")' in plain
    assert 'load_tuned("exports/m/tune.json")' in tuned
    assert all(f"#     {n} process" in plain for n in (1, 2, 4))
    assert max(map(len, plain.splitlines())) < 200


def test_one_process_gets_the_threads(tmp_path: Path) -> None:
    """Those of the computer where it is started; the user's own number wins."""
    cores = len(os.sched_getaffinity(0))
    found = run(tmp_path, text(), *show("OMP_NUM_THREADS"))
    own = run(tmp_path, text(), *show("OMP_NUM_THREADS"), OMP_NUM_THREADS="7")

    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[:2] == ["0", str(cores)]
    assert "server 0: env OMP_NUM_THREADS=" in found.stderr
    assert own.stdout.split()[:2] == ["0", "7"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_processes_have_cores_of_their_own(tmp_path: Path) -> None:
    """Each knows its number."""
    found = run(tmp_path, text(TUNED), *show("OMP_NUM_THREADS"), PROCESSES="2")
    lines = sorted(found.stdout.splitlines())

    assert found.returncode == 0, found.stderr
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert not int(lines[0].split()[2], 16) & int(lines[1].split()[2], 16)  # masks of their cores
    assert found.stderr.count("taskset -c") == 2


def test_tuned_settings_are_for_one_process_and_the_users_win(tmp_path: Path) -> None:
    """What the record says, unless it is set."""
    found = run(tmp_path, text(TUNED), *show("OMP_WAIT_POLICY"))
    threads = run(tmp_path, text(TUNED), *show("OMP_NUM_THREADS"))
    own = run(tmp_path, text(TUNED), *show("OMP_WAIT_POLICY"), OMP_WAIT_POLICY="ACTIVE")

    assert found.stdout.split()[:2] == ["0", "PASSIVE"]
    assert threads.stdout.split()[:2] == ["0", "3"]
    assert own.stdout.split()[:2] == ["0", "ACTIVE"]


@pytest.mark.parametrize(
    ("command", "environment", "words"),
    [((), {}, "usage"), (("true",), {"OMP_NUM_THREADS": "many"}, "not a number of threads")],
)
def test_bad_starts(command: tuple[str, ...], environment: dict[str, str], words: str, tmp_path: Path) -> None:
    """A message and a status that says so."""
    found = run(tmp_path, text(), *command, **environment)

    assert found.returncode == 2
    assert words in found.stderr


def test_when_one_fails_all_end(tmp_path: Path) -> None:
    """With its status, and without waiting for the other."""
    found = run(tmp_path, text(), "sh", "-c", 'test "$PLAIT_INDEX" = 1 && exit 7; exec sleep 50', PROCESSES="2")

    assert found.returncode == 7
