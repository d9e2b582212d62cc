"""What clouds ask for an hour, each price with its date and source."""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from plait.errors import HardwareError
from plait.hardware.catalogue import load_accelerators
from plait.hardware.tables import number, rows, usable
from plait.schema.records import Record
from plait.units import GIB

__all__ = ["COLUMNS", "OLD", "Offer", "age_warning", "cheapest", "days_old", "load_offers", "read_offers"]

OLD = 90  # days, after which a price is an estimate (issue 5)

COLUMNS = (  # noqa: SIM905 - one line a person can compare with the header
    "cloud,instance_type,accelerator,accelerator_count,vcpus,memory_gib,region,price_usd_per_hour,"
    "spot_price_usd_per_hour,as_of,source"
).split(",")


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer(Record):
    """One instance type in one region."""

    cloud: str
    instance_type: str
    accelerator: str
    count: float
    """Accelerators in the instance; a fraction is a slice of one."""
    vcpus: float | None
    memory_bytes: float | None
    region: str
    usd_per_hour: float | None
    """On demand, whole instance; None: only spot or auction prices exist."""
    spot_usd_per_hour: float | None
    as_of: str
    source: str

    def price(self, *, spot: bool = False) -> float:
        """Dollars an hour for one accelerator.

        Raises:
            HardwareError: the offer has no such price.
        """
        whole = self.spot_usd_per_hour if spot else self.usd_per_hour
        if whole is None:
            kind = "spot" if spot else "on-demand"
            raise HardwareError(
                f"offer {self.cloud} {self.instance_type} ({self.region}) has no {kind} price",
                hint="ask the cloud, or choose an offer with a price",
            )
        return whole / self.count


@functools.cache
def load_offers(path: Path | None = None) -> tuple[Offer, ...]:
    """Every offer, checked.

    Raises:
        HardwareError: the table is unreadable, an accelerator is unknown, or a key is used twice.
    """
    if path is not None:
        return read_offers(path, load_accelerators())
    return usable("offers.csv", lambda table: read_offers(table, load_accelerators()))


def read_offers(path: Path, known: Mapping[str, object]) -> tuple[Offer, ...]:
    """The offers of a table whose accelerators are in `known`.

    Raises:
        HardwareError: as `load_offers`.
    """
    seen: set[tuple[str, ...]] = set()
    offers = []
    for where, cells in rows(path, COLUMNS):
        if cells["accelerator"] not in known:
            raise HardwareError(f"{where}: accelerator {cells['accelerator']!r} is not in the catalogue")
        key = (cells["cloud"], cells["instance_type"], cells["accelerator"], cells["region"])
        if key in seen:
            raise HardwareError(f"{where}: {' '.join(key)} is there twice")
        seen.add(key)
        count = number(where, cells, "accelerator_count", high=1e5)
        if not count:
            raise HardwareError(f"{where}: accelerator_count={cells['accelerator_count']!r} must be above 0")
        offers.append(
            Offer(
                cloud=cells["cloud"],
                instance_type=cells["instance_type"],
                accelerator=cells["accelerator"],
                count=count,
                vcpus=number(where, cells, "vcpus", high=1e6),
                memory_bytes=number(where, cells, "memory_gib", scale=GIB, high=1e7),
                region=cells["region"],
                usd_per_hour=number(where, cells, "price_usd_per_hour", high=1e5),
                spot_usd_per_hour=number(where, cells, "spot_price_usd_per_hour", high=1e5),
                as_of=cells["as_of"],
                source=cells["source"],
            )
        )
    return tuple(offers)


def cheapest(accelerator: str) -> Offer | None:
    """The lowest on-demand price for one whole `accelerator`; None where no offer has one."""
    priced = [o for o in load_offers() if o.accelerator == accelerator and o.usd_per_hour and o.count >= 1]
    return min(priced, key=lambda offer: offer.price(), default=None)


def days_old(as_of: str, today: datetime.date) -> int | None:
    """Days since the (older) date in an offer's `as_of`; None where it has none."""
    try:
        dates = [datetime.date.fromisoformat(text) for text in re.findall(r"\d{4}-\d{2}-\d{2}", as_of)]
    except ValueError:  # such as 2026-02-31
        return None
    return (today - min(dates)).days if dates else None


def age_warning(as_of: str, where: str, today: datetime.date | None = None) -> str:
    """What to say of a price's age; '' where it is fresh. `where`: whom to ask."""
    age = days_old(as_of, today or datetime.datetime.now(tz=datetime.UTC).date())
    if age is None:
        return f"the price has no date ({as_of or 'none given'}): ask {where} before you rely on it"
    return f"the price is {age} days old ({as_of}): ask {where} before you rely on it" if age > OLD else ""
