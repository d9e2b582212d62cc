from __future__ import annotations

import pytest

from plait.cost.bubble import StageTimes, simulate
from plait.cost.cores import Tail, interpolate, simulate_shared
from plait.errors import HardwareError
from plait.schema.timing import Timing

UNEVEN = [StageTimes(1.0, 2.0), StageTimes(1.5, 2.5), StageTimes(0.5, 1.0), StageTimes(1.0, 2.5)]
NOTHING = [Tail(0.0, 0.0)] * 4


def shared(stages=UNEVEN, tails=NOTHING, schedule="1f1b", microbatches=4, cores=2, **more):
    return simulate_shared(schedule, stages, tails, microbatches=microbatches, cores=cores, processes=1, **more)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zerobubble"])
def test_cores_enough_change_nothing(schedule):
    """With a core for every rank the timeline is the usual one."""
    usual = simulate(schedule, UNEVEN, ranks=4, microbatches=6, delay=0.25)

    assert shared(schedule=schedule, microbatches=6, cores=4, delay=0.25).end == pytest.approx(usual.end)


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_work_is_conserved(cores):
    """No faster than all work over the cores, nor than with a core for everyone; one core is never idle."""
    work = 4 * sum(s.forward + s.backward for s in UNEVEN)
    found = shared(cores=cores).end

    assert found >= max(work / cores, shared(cores=4).end) - 1e-9
    if cores == 1:
        assert found == pytest.approx(work)


def test_a_bubble_is_not_lost():
    """Four stages on two cores take less than twice as long as on four: idle stages leave their core to others."""
    assert shared(cores=2).end < 2 * shared(cores=4).end - 1.0


def test_waits_take_no_core():
    """A wait is not stretched by others' work; the same seconds of a core are."""
    one = [StageTimes(3.0, 6.0, forward_wait=1.0, backward_wait=2.0)]
    found = simulate_shared("1f1b", one, [Tail(1.0, 0.5)], microbatches=2, cores=1, processes=2)

    assert found.end == pytest.approx(2 * (2 * 6.0 + 3.0) + 2 * 1.0 + 0.5)
    assert found.busy[0] == pytest.approx(found.end)


def test_messages_cost_a_core_on_both_sides():
    """Handling is added to whoever sends and to whoever receives."""
    two, tails = [StageTimes(1.0, 2.0)] * 2, NOTHING[:2]
    found = simulate_shared("gpipe", two, tails, microbatches=1, cores=1, processes=1, handling=0.1)

    assert found.end == pytest.approx(2 * 3.0 + 4 * 0.1)


def test_long_runs_repeat_their_last_rounds():
    """Many microbatches are not simulated one by one, and cost what they would."""
    exact = 40 * sum(s.forward + s.backward for s in UNEVEN) / 2

    assert shared(microbatches=40).end == pytest.approx(exact, rel=0.05)


TIMINGS = [
    Timing(collective="all_reduce", ranks=4, nbytes=1000, core=1.0, wait=2.0),
    Timing(collective="all_reduce", ranks=4, nbytes=2000, core=3.0, wait=1.5),
    Timing(collective="all_reduce", ranks=2, nbytes=1000, core=0.5, wait=0.1),
]


@pytest.mark.parametrize(("nbytes", "core"), [(10, 1.0), (1500, 2.0), (4000, 7.0)])
def test_between_sizes_time_is_linear(nbytes, core):
    """Constant below the smallest message, linear between and beyond; noise that falls with size is levelled."""
    assert interpolate(TIMINGS, "all_reduce", 4, nbytes) == (pytest.approx(core), pytest.approx(2.0))


def test_other_groups_take_the_nearest():
    """Eight ranks are read from four; what was never measured is nothing."""
    assert interpolate(TIMINGS, "all_reduce", 8, 1000) == interpolate(TIMINGS, "all_reduce", 4, 1000)
    assert interpolate(TIMINGS, "send", 2, 1000) == (0.0, 0.0)


@pytest.mark.parametrize("wrong", [{"core": -1.0}, {"wait": float("nan")}, {"ranks": 1}, {"collective": "gossip"}])
def test_absurd_timings_are_refused(wrong):
    """A cluster file is checked figure by figure."""
    with pytest.raises(HardwareError, match="timing"):
        Timing(**{"collective": "send", "ranks": 2, "nbytes": 8.0, "core": 0.1, "wait": 0.1} | wrong)
