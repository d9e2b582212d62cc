"""Ways to serve on what is offered: tensor and pipeline degrees, instances, batch. All are costed: each takes microseconds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from plait.advice.runtimes import Choice
from plait.advice.shapes import APART, Shape
from plait.cost.serving import Load, ServingEstimate, ServingPlan, batches, estimate_serving
from plait.cost.serving_work import Served
from plait.errors import HardwareError, PlanError
from plait.hardware.catalogue import Accelerator, load_accelerators
from plait.hardware.offers import Offer
from plait.schema.cluster import Cluster, Group

__all__ = ["Way", "sliced", "ways"]

MOST_INSTANCES = 8
"""That one replica is spread over."""


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """One unit that is rented whole: `instances` instances with as many replicas as they hold."""

    part: Accelerator
    choice: Choice
    per_instance: float
    """Accelerators of an instance; a fraction is a slice."""
    instances: int
    offers: tuple[Offer, ...]
    estimate: ServingEstimate

    @property
    def devices(self) -> float:
        """Accelerators of the unit."""
        return self.per_instance * self.instances

    def hourly(self, *, spot: bool) -> tuple[float, Offer] | None:
        """(dollars an hour of the unit, the cheapest offer); None where none has such a price."""
        prices = [
            (whole * self.instances, offer)
            for offer in self.offers
            if (whole := offer.spot_usd_per_hour if spot else offer.usd_per_hour)
        ]
        return min(prices, key=lambda item: item[0], default=None)


def sliced(part: Accelerator, share: float) -> Accelerator:
    """`part` as a slice of it: memory, bandwidth and arithmetic in proportion, as vGPU profiles are sold."""
    device = part.device

    def scaled(value: float | None) -> float | None:
        return None if value is None else value * share

    return replace(
        part,
        device=replace(
            device,
            peak_flops={k: v * share for k, v in device.peak_flops.items()},
            memory_bytes=scaled(device.memory_bytes),
            memory_bandwidth=scaled(device.memory_bandwidth),
            power_w=scaled(device.power_w),
        ),
    )


def ways(
    offers: Sequence[Offer],
    everything: Sequence[Offer],
    work: Served,
    load: Load,
    choices: Mapping[str, Choice],
    heads: frozenset[int],
    failed: list[tuple[str, str]],
    joins: Callable[[Offer], bool] = lambda _: True,
) -> Iterator[Way]:
    """Every way that fits, at every batch size worth a look; what cannot be costed goes to `failed`.

    Tensor parallelism stays within an instance and divides the heads; a replica that needs more than an instance is a
    pipeline over instances that are joined by a network (the rule of `shapes_of`).
    """
    largest: dict[tuple[str, str], float] = defaultdict(float)
    for offer in (*everything, *offers):
        largest[offer.cloud, offer.accelerator] = max(largest[offer.cloud, offer.accelerator], offer.count)
    sellers: dict[tuple[str, float], list[Offer]] = defaultdict(list)
    joined: dict[tuple[str, float], list[Offer]] = defaultdict(list)
    for offer in offers:
        key = (offer.accelerator, offer.count)
        sellers[key].append(offer)
        if (
            joins(offer)
            and offer.cloud not in APART
            and offer.count >= 4
            and offer.count >= largest[offer.cloud, offer.accelerator]
        ):
            joined[key].append(offer)
    parts = load_accelerators()
    for (name, count), group in sellers.items():
        part, choice = parts[name], choices[name]
        if count >= 1 and count != int(count):
            continue
        found = 0
        try:
            for way in _in_one(part, choice, count, tuple(group), work, load, heads):
                found += 1
                yield way
            if not found and joined[name, count]:
                yield from _over_several(part, choice, int(count), tuple(joined[name, count]), work, load, heads)
        except (HardwareError, PlanError) as problem:
            failed.append((f"{count:g}x{name}", problem.message.splitlines()[0]))


def _in_one(part: Accelerator, choice: Choice, count: float, offers: tuple[Offer, ...], work: Served, load: Load,
            heads: frozenset[int]) -> Iterator[Way]:  # fmt: skip
    """Replicas within one instance."""
    if count < 1:
        part = sliced(part, count)
    whole = max(1, int(count))
    for tp in _degrees(whole, heads):
        cluster = _cluster(part, whole, tp, whole)
        plan = ServingPlan(tp=tp, replicas=whole // tp, precision=choice.precision)
        for found in _sizes(work, cluster, plan, load, choice):
            yield Way(part, choice, count, 1, offers, found)


def _over_several(part: Accelerator, choice: Choice, count: int, offers: tuple[Offer, ...], work: Served, load: Load,
                  heads: frozenset[int]) -> Iterator[Way]:  # fmt: skip
    """One replica over the fewest instances that hold it: tensor parallel within, a pipeline between."""
    tp = max(_degrees(count, heads))
    instances = 2
    while instances <= MOST_INSTANCES:
        pp = instances * count // tp
        cluster = _cluster(part, tp * pp, tp * pp, count)
        found = list(_sizes(work, cluster, ServingPlan(tp=tp, pp=pp, precision=choice.precision), load, choice))
        if found:
            for estimate in found:
                yield Way(part, choice, count, instances, offers, estimate)
            return
        instances *= 2


def _sizes(work: Served, cluster: Cluster, plan: ServingPlan, load: Load, choice: Choice) -> Iterator[ServingEstimate]:
    """Estimates at every batch size that memory holds."""
    first = estimate_serving(work, cluster, plan, load, software=choice.software)
    for size in batches(first.largest_batch):
        yield estimate_serving(work, cluster, replace(plan, batch=size), load, software=choice.software)


def _degrees(count: int, heads: frozenset[int]) -> list[int]:
    """Tensor degrees: powers of two that divide the instance's accelerators and the heads."""
    sizes = [1 << i for i in range(int(math.log2(count)) + 1)]
    return [t for t in sizes if count % t == 0 and all(h % t == 0 for h in heads)]


def _cluster(part: Accelerator, count: int, group: int, per_node: int) -> Cluster:
    """`count` devices of one part; alone, no network is needed."""
    if group == 1:
        return Cluster(name=part.name, groups=(Group(device=part.device, count=1),), links=())
    return Shape(part, count, per_node, ()).cluster()
