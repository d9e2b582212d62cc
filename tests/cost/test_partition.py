from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cost.partition import balanced_cuts, stage_bounds
from plait.errors import PlanError


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10.0), min_size=2, max_size=9), st.integers(1, 5))
def test_the_slowest_stage_is_as_fast_as_can_be(costs, stages):
    """No other way to cut has a smaller largest stage."""
    stages = min(stages, len(costs))

    def slowest(cuts):
        return max(sum(costs[a:b]) for a, b in stage_bounds(cuts, len(costs)))

    best = min(slowest(c) for c in itertools.combinations(range(1, len(costs)), stages - 1))

    assert slowest(balanced_cuts(costs, stages)) == pytest.approx(best, rel=1e-9)


def test_more_stages_than_segments_are_refused():
    """A stage holds at least one segment."""
    with pytest.raises(PlanError, match="4 pipeline stages need at least 4 segments, the model has 3"):
        balanced_cuts([1.0, 1.0, 1.0], 4)


def test_a_cut_outside_the_model_is_refused():
    """A plan made for a deeper model is not this model's."""
    with pytest.raises(PlanError, match="the cut at segment 9 is outside the model"):
        stage_bounds((9,), 4)
