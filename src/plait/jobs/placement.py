"""Which axis of the mesh stays inside a node, and the refusal where tensor parallelism would not.

Ranks count node by node (rank = node x devices per node + local rank) and the mesh is laid over them with tp
fastest, then cp, fsdp, dp, and pp slowest (`plait.schema.plan`): a group of an axis is `degree` ranks, `stride` apart.

    2 nodes of 4, tp=2,fsdp=2,pp=2        node 0: 0 1 2 3      node 1: 4 5 6 7
    tp: stride 1, groups 01 23 45 67      fsdp: stride 2, groups 02 13 46 57      pp: stride 4, groups 04 15 26 37
"""

from __future__ import annotations

from dataclasses import dataclass

from plait.errors import PlanError
from plait.schema import Plan
from plait.schema.records import Record

__all__ = ["Axis", "check_placement", "placement", "shape_of", "table"]

FAST_TO_SLOW = ("tp", "cp", "fsdp", "dp", "pp")
_USUAL_NODE = 8  # accelerators in a node of every large cloud's usual machine (see the counts in data/names.csv)


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis(Record):
    """One axis of the mesh on the nodes."""

    axis: str
    degree: int
    stride: int
    """Ranks between neighbours of a group."""
    nodes: int
    """Nodes that one group of this axis touches, at most."""

    @property
    def is_inside(self) -> bool:
        """Whether every group stays inside one node."""
        return self.nodes == 1


def shape_of(plan: Plan, nodes: int | None, devices_per_node: int | None) -> tuple[int, int]:
    """(nodes, devices of each): what was asked for, the rest from the plan; nodes of 8 where nothing was said.

    Raises:
        PlanError: they do not multiply to the plan's devices.
    """
    need = plan.devices
    if nodes is None and devices_per_node is None:
        nodes = 1 if need <= _USUAL_NODE else -(-need // _USUAL_NODE)
    if nodes is None:
        assert devices_per_node is not None
        nodes = -(-need // devices_per_node)
    if devices_per_node is None:
        devices_per_node = -(-need // nodes)
    if nodes * devices_per_node != need:
        raise PlanError(
            f"launch: the plan {plan.spec()} needs {need} devices, {nodes} nodes of {devices_per_node} are "
            f"{nodes * devices_per_node}",
            hint="give --nodes and --devices-per-node that multiply to the plan's devices, or another --plan",
        )
    return nodes, devices_per_node


def placement(plan: Plan, devices_per_node: int) -> tuple[Axis, ...]:
    """Each axis of the plan that is longer than 1, fastest first."""
    found, stride = [], 1
    for name in FAST_TO_SLOW:
        degree = getattr(plan, name)
        if degree > 1:
            reach = stride * (degree - 1)
            starts = [s for s in range(plan.devices) if (s // stride) % degree == 0]
            touched = max(len({rank // devices_per_node for rank in range(s, s + reach + 1, stride)}) for s in starts)
            found.append(Axis(axis=name, degree=degree, stride=stride, nodes=touched))
        stride *= degree
    return tuple(found)


def check_placement(plan: Plan, devices_per_node: int, *, tp_may_cross: bool = False) -> tuple[Axis, ...]:
    """The placement, unless tp would cross nodes unasked.

    Raises:
        PlanError: a tp group lies on several nodes.
    """
    axes = placement(plan, devices_per_node)
    for axis in axes:
        if axis.axis == "tp" and not axis.is_inside and not tp_may_cross:
            better = [d for d in range(1, devices_per_node + 1) if devices_per_node % d == 0 and plan.tp % d == 0]
            raise PlanError(
                f"launch: tp={plan.tp} would cross nodes of {devices_per_node} devices "
                f"(a group touches {axis.nodes} nodes)",
                hint="tp talks in every layer and belongs on a node's own links: "
                f"use tp={max(better)}, nodes of a multiple of {plan.tp} devices, or pass --tp-across-nodes",
            )
    return axes


def table(axes: tuple[Axis, ...]) -> list[str]:
    """The placement as lines of a comment."""
    lines = [f"  {'axis':<5} {'degree':>6} {'ranks apart':>12}   groups"]
    for axis in axes:
        where = "inside one node" if axis.is_inside else f"over {axis.nodes} nodes"
        lines.append(f"  {axis.axis:<5} {axis.degree:>6} {axis.stride:>12}   {where}")
    return lines if axes else ["  one device"]
