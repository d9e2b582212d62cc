"""Why this plan, why not the next, which resource binds, and what another number of devices would change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from plait.cost.step import estimate
from plait.errors import HardwareError, PlaitError
from plait.hardware.catalogue import find
from plait.hardware.clusters import network_of
from plait.plan.search import SearchResult, search
from plait.plan.space import Space, unsupported
from plait.schema.cluster import Cluster, Link
from plait.schema.estimate import Estimate, LaneEstimate
from plait.schema.graph import Graph
from plait.units import format_bytes, format_seconds

__all__ = ["Explanation", "explain", "resized"]

_PARTS = {
    "compute": "forward and backward",
    "recompute": "recomputation",
    "communication_exposed": "communication that shows",
    "bubble": "waiting for other stages",
    "optimizer": "the optimizer",
    "other": "host and stragglers",
}
_RESOURCE = {
    "compute": "arithmetic",
    "recompute": "memory (work is done again to save it)",
    "communication_exposed": "the network",
    "bubble": "the pipeline's bubble (too few microbatches for its length)",
    "optimizer": "memory bandwidth (optimizer)",
    "other": "host time and stragglers",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """Sentences for people and the figures behind them."""

    binding: str
    """The resource that takes most of the step."""
    lines: tuple[str, ...]
    devices: dict[int, float]
    """Step seconds of the best plan on another number of devices; inf: none fits."""


def resized(cluster: Cluster, count: int) -> Cluster:
    """The cluster with `count` devices, taken from or added to its last group.

    Raises:
        HardwareError: it would need a network between nodes, and none is known.
    """
    groups = list(cluster.groups)
    others = sum(group.count for group in groups[:-1])
    while count <= others and len(groups) > 1:
        groups.pop()
        others = sum(group.count for group in groups[:-1])
    groups[-1] = replace(groups[-1], count=count - others)
    links = [link for link in cluster.links if link.level != "site"]
    sites = [link for link in cluster.links if link.level == "site"]
    if count > max((link.size for link in links), default=1):
        links.append(replace(sites[-1], size=count) if sites else _site(groups[-1].device.name, count))
    return replace(cluster, name=f"{cluster.name} with {count} devices", groups=tuple(groups), links=tuple(links))


def _site(part: str, count: int) -> Link:
    """The usual network between nodes of a catalogue's part."""
    network = network_of(find(part), "site")
    if network is None:
        raise HardwareError(f"{part}: the network between nodes is not known")
    return Link(level="site", size=count, bandwidth=network.bandwidth, latency=network.latency, name=network.name,
                source=network.source)  # fmt: skip


def explain(
    result: SearchResult,
    graph: Graph,
    cluster: Cluster,
    *,
    space: Space | None = None,
    other_counts: Sequence[int] | None = None,
) -> Explanation:
    """The explanation of a search's best plan; `other_counts` are searched as well (by default a node more and less)."""
    best = result.plans[0]
    shares = {name: getattr(best.breakdown, name) for name in _PARTS}
    largest = max(shares, key=shares.__getitem__)
    lines = [f"{best.plan.spec()}: {format_seconds(best.step_time_s)} a step on {best.plan.devices} devices"]
    lines.append(
        "  "
        + ", ".join(
            f"{_PARTS[n]} {100 * s / best.step_time_s:.0f} %" for n, s in shares.items() if s > 0.005 * best.step_time_s
        )
    )
    waste = {n: s for n, s in shares.items() if n not in ("compute", largest)}
    second = max(waste, key=waste.__getitem__)
    binding = _RESOURCE[largest]
    lines.append(
        f"binds: {binding}" + (f", then {_RESOURCE[second]}" if waste[second] > 0.02 * best.step_time_s else "")
    )
    by_speed = " by speed" if best.plan.batch_shares else ""
    lines += [f"samples{by_speed}: {_lane_text(lane)}" for lane in best.lanes]
    lines += _memory_line(best, graph, cluster)
    if len(result.plans) > 1:
        lines.append(_difference(best, result.plans[1]))
    lines += [f"cannot be run by plait yet: {reason}" for reason in unsupported(best.plan)]
    step = max(1, cluster.node_size if cluster.devices >= 2 * cluster.node_size else 1)
    counts = (
        other_counts
        if other_counts is not None
        else [c for c in (cluster.devices - step, cluster.devices + step) if c > 0]
    )
    found = {}
    for count in counts:
        seconds = _on(count, graph, cluster, best, space)
        found[count] = seconds
        if seconds == float("inf"):
            lines.append(f"with {count} devices: no plan fits or divides the batch")
        else:
            change = 100 * (seconds / best.step_time_s - 1)
            lines.append(f"with {count} devices: {format_seconds(seconds)} a step ({change:+.0f} %)")
    return Explanation(binding, tuple(lines), found)


def _on(count: int, graph: Graph, cluster: Cluster, best: Estimate, space: Space | None) -> float:
    try:
        found = search(
            graph, resized(cluster, count), batch=best.batch, precision=best.plan.precision, top=1, space=space
        )
    except PlaitError:
        return float("inf")
    return found.plans[0].step_time_s


def _lane_text(lane: LaneEstimate) -> str:
    """What one kind of replica gets and how long it takes."""
    devices = " and ".join(dict.fromkeys(lane.devices))
    who = f"each of {len(lane.replicas)} replicas" if len(lane.replicas) > 1 else "1 replica"
    return f"{lane.samples:g} for {who} on {devices}, done after {format_seconds(lane.step_time_s)}"


def _memory_line(best: Estimate, graph: Graph, cluster: Cluster) -> list[str]:
    """How full the fullest rank is, and what its memory costs in time."""
    if best.memory_limit is None:
        return []
    parts = best.memory[best.fullest]
    kinds = sorted(parts.to_dict().items(), key=lambda item: -item[1])[:3]
    shown = ", ".join(f"{name} {format_bytes(value)}" for name, value in kinds)
    lines = [
        f"memory: {format_bytes(parts.total)} of {format_bytes(best.memory_limit)} on pipeline rank {best.fullest} ({shown})"
    ]
    if best.plan.recompute != "none" or best.plan.recompute_segments:
        free = replace(best.plan, recompute="none", recompute_segments=None)
        try:
            other = estimate(graph, cluster, free, best.batch)
        except PlaitError:
            return lines
        if not other.fits:
            lines.append(
                f"  without recomputation it would take {format_seconds(other.step_time_s)} and {format_bytes(other.peak_memory)}: "
                "memory binds"
            )
    return lines


def _difference(best: Estimate, other: Estimate) -> str:
    """What makes the second plan slower."""
    gaps = {n: getattr(other.breakdown, n) - getattr(best.breakdown, n) for n in _PARTS}
    worst = max(gaps, key=gaps.__getitem__)
    slower = 100 * (other.step_time_s / best.step_time_s - 1)
    return f"next: {other.plan.spec()} is {slower:.1f} % slower, mostly by {_PARTS[worst]} (+{format_seconds(max(0.0, gaps[worst]))})"
