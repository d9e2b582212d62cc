"""How many accelerators, in which instances: what is worth estimating of the offers that remain."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from plait.hardware.catalogue import Accelerator
from plait.hardware.clusters import uniform_cluster
from plait.hardware.offers import Offer
from plait.schema.cluster import Cluster

__all__ = ["APART", "LARGEST", "Shape", "shapes_of"]

LARGEST = 16384
"""Accelerators: as many as the largest published training runs took (Llama 3, arXiv 2407.21783)."""
# Hosts of many owners, brokers of them, and a service of single machines: no network between them is stated.
APART = ("vast", "shadeform", "primeintellect", "huggingface")


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """`count` accelerators of one kind in instances of `per_instance`: what a step's time depends on."""

    part: Accelerator
    count: int
    per_instance: int
    offers: tuple[Offer, ...]
    """All that sell it, each for its own price."""

    @property
    def instances(self) -> int:
        """Instances that are rented."""
        return self.count // self.per_instance

    def cluster(self) -> Cluster:
        """The machine: instances joined by the part's usual network, or by its own where that reaches further.

        Raises:
            HardwareError: a figure that it needs is not known.
        """
        within = self.part.device.category == "tpu" and self.count <= (self.part.max_scale_up or 1)
        per_node = None if self.instances == 1 or within else self.per_instance
        return uniform_cluster(self.part, self.count, per_node=per_node, name=f"{self.count}x{self.part.name}")

    def hourly(self, *, spot: bool) -> tuple[float, Offer] | None:
        """(dollars an hour of the whole, the cheapest offer); None where none has such a price."""
        prices = [
            (whole * self.instances, offer)
            for offer in self.offers
            if (whole := offer.spot_usd_per_hour if spot else offer.usd_per_hour)
        ]
        return min(prices, key=lambda item: item[0], default=None)


def shapes_of(
    offers: Sequence[Offer],
    parts: Mapping[str, Accelerator],
    least: Mapping[str, int],
    hours_alone: Mapping[str, float],
    batch: int,
    everything: Sequence[Offer] = (),
    enough: float = 1.0,
    joined: Callable[[Offer], bool] = lambda _: True,
) -> Iterator[Shape]:
    """Every shape from the smallest count that can hold the model, doubling until the bound is below `enough` hours.

    `parts` are the accelerators by name; `joined` says whether several instances of an offer may be joined at all. `least` are the devices of each part that hold weights and optimizer, `hours_alone` one device's hours at best.

    Several instances are joined only where they hold four accelerators or more and are the largest that this cloud has
    of the part (among `everything` it sells): smaller ones seldom have the network that the catalogue states for whole nodes; what a marketplace or broker sells is never
    joined. No more accelerators than `batch` samples can feed:
    eight a sample.
    """
    largest: dict[tuple[str, str], float] = defaultdict(float)
    for offer in (*everything, *offers):
        key = (offer.cloud, offer.accelerator)
        largest[key] = max(largest[key], offer.count)
    sellers: dict[tuple[str, int, int], list[Offer]] = defaultdict(list)
    for offer in offers:
        per = int(offer.count)
        if per != offer.count:
            continue
        need = max(per, least[offer.accelerator])
        alone = (
            not joined(offer)
            or offer.cloud in APART
            or per < 4
            or offer.count < largest[offer.cloud, offer.accelerator]
        )
        if alone and need > per:
            continue
        count = per << math.ceil(math.log2(need / per))
        while count <= min(LARGEST, 8 * batch):
            sellers[offer.accelerator, count, per].append(offer)
            if alone or hours_alone[offer.accelerator] / count < enough:
                break
            count *= 2
    for (name, count, per), group in sellers.items():
        yield Shape(parts[name], count, per, tuple(group))
