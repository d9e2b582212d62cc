from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cost import bubble
from plait.cost.bubble import StageTimes, least_seconds, order, simulate

EQUAL = [StageTimes(1.0, 2.0, 1.0)] * 4


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("microbatches", [1, 4, 7, 16, 200])
def test_equal_stages_have_the_textbook_bubble(schedule, microbatches):
    """(p - 1) of m + p - 1 rounds are bubble, short or long."""
    assert simulate(schedule, EQUAL, ranks=4, microbatches=microbatches).end == 3 * (microbatches + 3)


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("microbatches", [4, 8, 64])
def test_interleaving_divides_the_bubble(chunks, microbatches):
    """With v stages on each rank the bubble is 1/v of it (Narayanan et al. 2021)."""
    stages = [StageTimes(1 / chunks, 2 / chunks)] * 4 * chunks

    assert simulate("interleaved", stages, ranks=4, microbatches=microbatches).end == pytest.approx(
        3 * microbatches + 9 / chunks
    )


@pytest.mark.parametrize("microbatches", [4, 8, 64])
def test_zero_bubble_hides_weight_gradients(microbatches):
    """ZB-H1's bubble is (p - 1)(f + b - w) of the input-gradient backward (Qi et al. 2023)."""
    assert simulate("zerobubble", EQUAL, ranks=4, microbatches=microbatches).end == 3 * microbatches + 3


stages = st.lists(
    st.tuples(st.floats(0.1, 2.0), st.floats(0.5, 3.0)).map(lambda t: StageTimes(t[0], t[1], t[1] / 3)),
    min_size=2,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(stages, st.integers(1, 12), st.sampled_from(["gpipe", "1f1b", "zerobubble"]), st.floats(0.0, 0.5))
def test_the_bound_holds(stages, microbatches, schedule, delay):
    """No schedule ends before what the search takes as the least."""
    found = simulate(schedule, stages, ranks=len(stages), microbatches=microbatches, delay=delay)

    assert found.end >= least_seconds(stages, ranks=len(stages), microbatches=microbatches, late=0.0) * (1 - 1e-9)
    if schedule != "zerobubble":
        assert found.end >= least_seconds(stages, ranks=len(stages), microbatches=microbatches) * (1 - 1e-9)


@settings(deadline=None, max_examples=30)
@given(stages, st.floats(0.0, 0.3))
def test_the_steady_state_is_repeated_rightly(stages, delay):
    """A long run is simulated in part; simulating all of it gives the same to 1 %."""
    part = simulate("1f1b", stages, ranks=len(stages), microbatches=50, delay=delay).end
    kept, bubble._STEADY = bubble._STEADY, 100
    try:
        whole = simulate("1f1b", stages, ranks=len(stages), microbatches=50, delay=delay).end
    finally:
        bubble._STEADY = kept

    assert part == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zerobubble", 1)])
def test_every_microbatch_is_done_once(schedule, chunks):
    """Each rank runs each forward and each backward of its stages exactly once."""
    work = order(schedule, 1, 4, chunks, 8)

    for kind in ("forward", "backward"):
        done = [(chunk, microbatch) for k, chunk, microbatch in work if k == kind]
        assert sorted(done) == [(c, m) for c in range(chunks) for m in range(8)]


def test_spans_tell_the_story():
    """The timeline's first pieces follow one another on a rank and never overlap."""
    found = simulate("1f1b", EQUAL, ranks=4, microbatches=8, keep=10)
    for rank in range(4):
        own = [span for span in found.spans if span.rank == rank]
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))
    assert found.bubble == found.end - 24
