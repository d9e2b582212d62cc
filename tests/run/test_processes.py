"""Processes: results by rank, and one failure that is shown instead of many."""

from __future__ import annotations

import os
import time

import pytest

from plait.errors import PlanError, WorkerError
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
