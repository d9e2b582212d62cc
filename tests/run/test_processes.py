"""Processes: results by rank, and one failure that is shown instead of many."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from plait.errors import PlanError, WorkerError
from plait.hardware.placement import places_here
from plait.run.processes import Workers

pytestmark = pytest.mark.multi


def _rank() -> int:
    return int(os.environ["RANK"])


def _refuse() -> None:
    raise PlanError("plan: no", hint="another one")


def _fail_on_one() -> None:
    if _rank() == 1:
        raise ValueError("the real cause")
    time.sleep(60)  # as if it waited for the other in a collective


def _die_on_one() -> None:
    if _rank() == 1:
        os._exit(7)
    time.sleep(60)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """Two processes; a failure's survivors are not waited for long."""
    monkeypatch.setattr("plait.run.processes.GRACE_SECONDS", 1.0)
    with Workers(2, threads=1) as workers:
        yield workers  # type: ignore[misc]


def test_results_come_by_rank_and_errors_as_they_were(two: Workers) -> None:
    """The processes stay between calls; after a failure they start anew."""
    assert two.call(_rank, timeout=60) == [0, 1]
    before = two.pids

    assert two.call(_rank, devices=1, timeout=60) == [0]
    assert two.pids == before
    with pytest.raises(PlanError, match="plan: no") as caught:
        two.call(_refuse, timeout=60)
    assert caught.value.hint == "another one"
    with pytest.raises(WorkerError, match="process 1: ValueError: the real cause"):
        two.call(_fail_on_one, timeout=60)
    with pytest.raises(WorkerError, match="process 1 ended with 7"):
        two.call(_die_on_one, timeout=60)
    with pytest.raises(WorkerError, match="no answer within the time limit"):
        two.call(time.sleep, 60, timeout=8)


def _settled() -> tuple[int, list[int]]:
    import torch

    return torch.get_num_threads(), sorted(os.sched_getaffinity(0))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_processes_keep_to_their_own_cores(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Each has the threads and cores that were chosen, one says so, and the user's own number of threads wins."""
    monkeypatch.setenv("PLAIT_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    allowed = sorted(os.sched_getaffinity(0))
    chosen = places_here(2)
    with Workers(2) as workers:
        found = workers.call(_settled, timeout=60)

    assert found == [(3, sorted(one.cpus) or allowed) for one in chosen]
    assert capfd.readouterr().err.count("OMP_NUM_THREADS=3 is set and wins") == 1
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_launchers_process_is_placed_once() -> None:
    """Its share of the cores, by torchrun's numbers; asked again (`plait.start(train=False)` does) it keeps the same."""
    code = (
        "import os, torch; from plait.run.processes import settle_under_launcher\n"
        "for _ in range(2):\n"
        "    settle_under_launcher()\n"
        "    print(torch.get_num_threads(), sorted(os.sched_getaffinity(0)))\n"
    )
    environment = {**os.environ, "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1", "PLAIT_DEVICE": "cpu"}
    environment.pop("OMP_NUM_THREADS", None)
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    mine = places_here(2, {})[1]

    assert found.stdout.splitlines() == [f"{mine.threads} {sorted(mine.cpus)}"] * 2
