"""Which axis stays inside a node."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import PlanError
from plait.jobs.placement import FAST_TO_SLOW, check_placement, placement, shape_of, table
from plait.schema import Plan


def test_tp_inside_pp_across():
    """The drawing at the top of placement.py."""
    axes = placement(Plan.parse("tp=2,fsdp=2,pp=2"), 4)

    assert [(a.axis, a.stride, a.nodes) for a in axes] == [("tp", 1, 1), ("fsdp", 2, 1), ("pp", 4, 2)]


def groups(plan: Plan, axis: str) -> list[list[int]]:
    """Groups of ranks that differ on one axis only, by counting through the mesh."""
    order = [getattr(plan, name) for name in reversed(FAST_TO_SLOW)]
    place = len(FAST_TO_SLOW) - 1 - FAST_TO_SLOW.index(axis)
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, coordinate in enumerate(itertools.product(*map(range, order))):
        found.setdefault((*coordinate[:place], *coordinate[place + 1 :]), []).append(rank)
    return list(found.values())


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 3)] * 5), st.integers(1, 8))
def test_nodes_touched_are_counted_right(degrees: tuple[int, ...], per_node: int):
    """The nodes of an axis are those that its widest group touches, whatever the mesh."""
    plan = Plan(**dict(zip(FAST_TO_SLOW, degrees, strict=True)))
    for axis in placement(plan, per_node):
        assert axis.nodes == max(len({rank // per_node for rank in group}) for group in groups(plan, axis.axis))


@pytest.mark.parametrize(
    ("plan", "per_node", "hint"),
    [
        ("tp=8", 4, "use tp=4"),
        ("tp=4,dp=3", 6, "use tp=2"),  # the second group would be ranks 4 to 7
        ("tp=3,dp=4", 4, "use tp=1"),
    ],
)
def test_tp_across_nodes_is_refused(plan: str, per_node: int, hint: str):
    """With both numbers, and the largest tp that would stay inside."""
    with pytest.raises(PlanError, match="would cross nodes") as caught:
        check_placement(Plan.parse(plan), per_node)

    assert hint in caught.value.hint
    assert "--tp-across-nodes" in caught.value.hint


def test_tp_across_nodes_when_asked():
    """It can be had."""
    (axis,) = check_placement(Plan.parse("tp=8"), 4, tp_may_cross=True)

    assert axis.nodes == 2


@pytest.mark.parametrize(
    ("plan", "nodes", "per_node", "shape"),
    [
        ("dp=4", None, None, (1, 4)),
        ("dp=16", None, None, (2, 8)),
        ("dp=4,pp=2", 2, None, (2, 4)),
        ("dp=4,pp=2", None, 2, (4, 2)),
        ("dp=4,pp=2", 4, 2, (4, 2)),
    ],
)
def test_shape(plan: str, nodes: int | None, per_node: int | None, shape: tuple[int, int]):
    """What was not said follows from the plan."""
    assert shape_of(Plan.parse(plan), nodes, per_node) == shape


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 4), (3, None), (None, 5)])
def test_shape_that_does_not_fit(nodes: int | None, per_node: int | None):
    """Nodes x devices must be the plan's devices."""
    with pytest.raises(PlanError, match="needs 4 devices"):
        shape_of(Plan.parse("dp=2,pp=2"), nodes, per_node)


def test_table_of_one_device():
    """There is nothing to place."""
    assert table(placement(Plan(), 1)) == ["  one device"]
