"""Seconds of collectives and sends, by algorithm and level of the network. Nothing is hidden here: see `overlap`.

A group of ranks is described by how many of its members lie within each level. Between nodes every member
has its own adapter, so a group with `l` members in a node leaves it at `l` times a device's bandwidth.

A link that was measured (`Link.timings`: collectives between processes of one computer) is read from these instead: seconds
of a core, which others than the message itself miss, and the wait beside them (`cores.interpolate`).

Known error: links are taken as shared by nobody else and rings as laid out well; published NCCL runs reach
70-95 % of these figures (the links' fitted `efficiency`), with spread of 10 % between runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plait.cost.cores import interpolate
from plait.schema.cluster import Cluster, Link
from plait.schema.timing import Timing

__all__ = [
    "Hop",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "core_seconds",
    "hops",
    "reduce_scatter",
    "send",
    "send_core",
]


@dataclass(frozen=True, slots=True)
class Hop:
    """One level of the network as a group of ranks uses it."""

    members: int
    """Of the group, within one unit of this level."""
    bandwidth: float
    """Bytes per second for each device, one direction, as reached."""
    latency: float
    """Seconds for an empty message."""
    timings: tuple[Timing, ...] = ()
    reached: float = 1.0
    """Of the speed that the timings show; in `bandwidth` already."""


def hops(cluster: Cluster, *, size: int, stride: int, efficiency: dict[str, float] | None = None,
         latency: dict[str, float] | None = None) -> tuple[Hop, ...]:  # fmt: skip
    """The levels that a group of `size` ranks, `stride` apart, crosses; smallest first.

    `efficiency` and `latency` multiply a link's figures, by level ("node", "site", ...).
    """
    found: list[Hop] = []
    within = 1
    for link in cluster.links:
        members = min(size, max(1, link.size // stride))
        if members > within:
            found.append(_hop(link, members, efficiency, latency))
            within = members
        if within >= size:
            break
    return tuple(found)


def _hop(link: Link, members: int, efficiency: dict[str, float] | None, latency: dict[str, float] | None) -> Hop:
    reached = (efficiency or {}).get(link.level, 1.0)
    return Hop(
        members, link.bandwidth * reached, link.latency * (latency or {}).get(link.level, 1.0), link.timings, reached
    )


def _measured(collective: str, total: float, group: Sequence[Hop], messages: float) -> tuple[float, float] | None:
    """(seconds of a core, further wait) of `total` bytes in `messages` parts; None where the link was not measured."""
    if not group[-1].timings:
        return None
    parts = max(1.0, messages)
    core, wait = interpolate(group[-1].timings, collective, group[-1].members, total / parts)
    return parts * core / group[-1].reached, parts * wait / group[-1].reached


def core_seconds(collective: str, total: float, group: Sequence[Hop], messages: float = 1) -> float:
    """The part of a collective's seconds in which it keeps a core of its process busy; 0 where that was not measured."""
    found = _measured(collective, total, group, messages) if group and total > 0 else None
    return found[0] if found else 0.0


def _bandwidth(group: Sequence[Hop]) -> float:
    """Bytes per second of a ring: its slowest level, where a level is left by all members below it at once."""
    below = 1
    slowest = math.inf
    for hop in group:
        slowest = min(slowest, hop.bandwidth * below)
        below = hop.members
    return slowest


def _ring_latency(group: Sequence[Hop]) -> float:
    """Seconds of one trip of an empty message around the ring, a round for each member."""
    below, total = 1, 0.0
    for hop in group:
        units = hop.members / below
        total = total * units + (units - 1) * hop.latency if below == 1 else total + (units - 1) * hop.latency
        below = hop.members
    return total


def _tree_latency(group: Sequence[Hop]) -> float:
    """Seconds for an empty message to reach every member of a binary tree."""
    below, total = 1, 0.0
    for hop in group:
        total += math.ceil(math.log2(hop.members / below)) * hop.latency if hop.members > below else 0.0
        below = hop.members
    return total


def all_gather(total: float, group: Sequence[Hop], messages: float = 1) -> float:
    """Seconds until every rank holds all shards of `total` bytes in `messages` parts.

    Source: Thakur, Rabenseifner and Gropp (2005), ring; hierarchical latency as in NCCL (one round in each level).
    """
    if not group or total <= 0:
        return 0.0
    if found := _measured("all_gather", total, group, messages):
        return sum(found)
    ranks = group[-1].members
    return (ranks - 1) / ranks * total / _bandwidth(group) + messages * _ring_latency(group)


def reduce_scatter(total: float, group: Sequence[Hop], messages: float = 1) -> float:
    """Seconds until every rank holds its shard of the sum of `total` bytes: as long as the all-gather, unless measured.

    gloo has none of its own and reduces everything everywhere; that is in its measurements.
    """
    if not group or total <= 0:
        return 0.0
    found = _measured("reduce_scatter", total, group, messages)
    return sum(found) if found else all_gather(total, group, messages)


def all_reduce(total: float, group: Sequence[Hop], messages: float = 1) -> float:
    """Seconds until every rank holds the sum of all ranks' `total` bytes, in `messages` parts; ring or double tree.

    Source: ring as twice `all_gather`; double binary tree, Sanders, Speck and Traeff (2009), as in NCCL 2.4 and later.
    """
    if not group or total <= 0:
        return 0.0
    if found := _measured("all_reduce", total, group, messages):
        return sum(found)
    ring = 2 * all_gather(total, group, messages)
    tree = 2 * total / _bandwidth(group) + 2 * messages * _tree_latency(group)
    return min(ring, tree)


def all_to_all(total: float, group: Sequence[Hop]) -> float:
    """Seconds until every rank has sent `total` bytes in equal parts to all ranks of its group.

    What stays in a level and what leaves it travel at once; the slower decides. Source: arithmetic; NCCL sends pairwise.
    """
    if not group or total <= 0:
        return 0.0
    ranks, below = group[-1].members, 1
    slowest = latency = 0.0
    for hop in group:
        slowest = max(slowest, total * (hop.members - below) / ranks / hop.bandwidth)
        latency += hop.latency * math.ceil(math.log2(max(2, hop.members / below)))
        below = hop.members
    return slowest + latency


def send(nbytes: float, cluster: Cluster, *, stride: int, count: int, efficiency: dict[str, float] | None = None,
         latency: dict[str, float] | None = None) -> float:  # fmt: skip
    """Seconds to hand `nbytes` to a neighbour `stride` ranks away, on the slowest of `count` - 1 such hops."""
    if count <= 1 or nbytes <= 0 or not cluster.links:
        return 0.0
    reach = stride * count
    link = next((link for link in cluster.links if link.size >= reach), cluster.links[-1])
    hop = _hop(link, 2, efficiency, latency)
    if hop.timings:
        return interpolate(hop.timings, "send", 2, nbytes)[1] / hop.reached
    return nbytes / hop.bandwidth + hop.latency


def send_core(nbytes: float, cluster: Cluster, efficiency: dict[str, float] | None = None) -> float:
    """Seconds of a core that either side of a send spends; 0 where the link was not measured."""
    if not cluster.links or not cluster.links[0].timings or nbytes <= 0:
        return 0.0
    hop = _hop(cluster.links[0], 2, efficiency, None)
    return interpolate(hop.timings, "send", 2, nbytes)[0] / hop.reached
