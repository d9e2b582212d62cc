"""Replicas of a plan by what sets their pace: their devices and their share of the samples.

    8xH100+8xV100 under dp=4,pp=2,tp=2, ranks in order:

    stage 0   H100 H100 | H100 H100 | H100 H100 | H100 H100      every replica has the same devices: one lane
    stage 1   V100 V100 | V100 V100 | V100 V100 | V100 V100

    under dp=4,tp=4:   H100 x4 | H100 x4 | V100 x4 | V100 x4     two lanes, which may take unequal shares

Replicas work side by side and wait for one another once a step, where gradients are summed: the step is as long as the
longest lane's. Known error: with zero=3 they also wait at each segment's gathering, which costs more where the ratio of
the lanes' speeds differs from segment to segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from plait.schema.cluster import Cluster, Device
from plait.schema.plan import Plan

__all__ = ["Lane", "device_runs", "lanes"]


@dataclass(frozen=True, slots=True)
class Lane:
    """Replicas that are alike."""

    devices: tuple[Device, ...]
    """The slowest device of each pipeline rank."""
    samples: float
    """Of each replica in one microbatch."""
    replicas: tuple[int, ...]
    """Which replicas they are."""


def lanes(cluster: Cluster, plan: Plan, batch: int) -> tuple[Lane, ...]:
    """The lanes of `plan`, whose microbatches are known, in the order of their first replicas."""
    if cluster.is_uniform and not plan.batch_shares:
        even = batch / plan.replicas / plan.microbatches
        return (Lane((cluster.groups[0].device,) * plan.pp, even, tuple(range(plan.replicas))),)
    shares = plan.batch_shares or (1,) * plan.replicas
    whole = batch / plan.microbatches / sum(shares)
    found: dict[tuple[tuple[str, ...], int], tuple[tuple[Device, ...], list[int]]] = {}
    for first, last, devices in device_runs(cluster, plan):
        names = tuple(device.name for device in devices)
        for replica in range(first, last):
            found.setdefault((names, shares[replica]), (devices, []))[1].append(replica)
    return tuple(Lane(devices, share * whole, tuple(replicas)) for (_, share), (devices, replicas) in found.items())


def device_runs(cluster: Cluster, plan: Plan) -> Iterator[tuple[int, int, tuple[Device, ...]]]:
    """(first, last + 1, slowest device of each pipeline rank) of neighbouring replicas with the same devices."""
    width, block = plan.tp * plan.cp, plan.devices // plan.pp
    edges = list(accumulate((group.count for group in cluster.groups), initial=0))
    breaks = {0, plan.replicas}
    for rank in range(plan.pp):
        for edge in edges:
            inside = edge - rank * block
            # A replica that lies on both sides of an edge is a run of its own.
            breaks |= {at for at in (inside // width, -(-inside // width)) if 0 < at < plan.replicas}
    for first, last in pairwise(sorted(breaks)):
        yield first, last, tuple(_slowest(cluster, edges, rank * block + first * width, width, plan.precision)
                                 for rank in range(plan.pp))  # fmt: skip


def _slowest(cluster: Cluster, edges: list[int], first: int, count: int, precision: str) -> Device:
    """The slowest of `count` ranks from `first` on: they share every sample, so the others wait for it."""
    inside = [
        group.device
        for group, (low, high) in zip(cluster.groups, pairwise(edges), strict=True)
        if low < first + count and first < high
    ]
    return min(inside, key=lambda device: device.peak_flops.get(precision, device.peak_flops.get("fp32", 0.0)))
