"""Today's offers from gpuhunt, a library of cloud prices, in the rows of our own table.

gpuhunt names parts by model and memory (`H100`, 80 GB), which does not tell SXM5 from PCIe. So the part is taken from the
instance type where our table knows it, from data/gpuhunt_parts.csv where the name leaves no doubt, and else the offer
is left out and counted.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.errors import PlaitError, RequestError
from plait.hardware.offers import Offer
from plait.hardware.tables import DATA, rows
from plait.units import GIB

__all__ = ["Fetched", "fetch", "merged"]

_CLOUDS = {"lambdalabs": "lambda", "vastai": "vast"}
"""gpuhunt's name of a cloud -> ours, where they differ."""
_WAIT = 30.0  # s, for each answer of the network
_JUMP = 10.0  # times dearer or cheaper than before: an error of the list (cents for dollars, a month for an hour)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """Offers that were understood, and how many were not."""

    offers: tuple[Offer, ...]
    clouds: tuple[str, ...]
    left_out: dict[str, int]
    """Reason -> number of gpuhunt's records."""


def fetch(known: Sequence[Offer], today: datetime.date) -> Fetched:
    """What gpuhunt's catalogue says now; `known` tells which part an instance type has.

    Raises:
        RequestError: gpuhunt is not installed.
        PlaitError: its catalogue cannot be reached, or has nothing that is understood.
    """
    try:
        import gpuhunt
    except ImportError:
        raise RequestError(
            "refresh: prices come through gpuhunt, which is not installed here",
            hint="pip install 'plait[prices]', or pass a table: --offers CSV",
        ) from None
    catalogue = gpuhunt.Catalog(balance_resources=False, auto_reload=False)
    log = logging.getLogger("gpuhunt")
    before, level = socket.getdefaulttimeout(), log.level
    log.setLevel(logging.CRITICAL + 1)  # it logs tracebacks; which clouds came is told by `Fetched.clouds`
    socket.setdefaulttimeout(_WAIT)  # gpuhunt sets none, and would wait for ever
    try:
        folder = os.environ.get("GPUHUNT_CATALOG_DIR")  # gpuhunt's own variable: a downloaded catalogue
        if folder is None:
            catalogue.load()
        names = (
            sorted(catalogue.catalog) if folder is None else sorted(path.stem for path in Path(folder).glob("*.csv"))
        )
        items = [item for name in names for item in catalogue.query(provider=name)]
    except (OSError, ValueError, KeyError, gpuhunt.GPUHuntError) as problem:
        cause = problem.__cause__ or problem
        raise PlaitError(
            f"refresh: no catalogue of prices could be read ({type(cause).__name__}: {cause})",
            hint="nothing was changed; try again with a network, or pass a table: --offers CSV",
        ) from None
    finally:
        socket.setdefaulttimeout(before)
        log.setLevel(level)
    versions = {name: catalogue.catalog[name].version for name in catalogue.catalog}
    return understood(items, known, versions, today)


def understood(items: Iterable[Any], known: Sequence[Offer], versions: dict[str, str], today: datetime.date) -> Fetched:
    """gpuhunt's records as offers: on-demand and spot price of an instance type in a region together.

    Raises:
        PlaitError: none is understood.
    """
    by_type = {(offer.cloud, offer.instance_type): offer for offer in known}
    parts = _parts()
    left_out: Counter[str] = Counter()
    found: dict[tuple[str, str, str], Offer] = {}
    for item in items:
        cloud = _CLOUDS.get(item.provider, item.provider)
        price = _number(item.price)
        like = by_type.get((cloud, item.instance_name))
        part = parts.get((str(item.gpu_name or "").lower(), _number(item.gpu_memory))) if like is None else None
        if price is None or not item.instance_name or not item.location:
            left_out["without a price, a name or a place"] += 1
        elif like is None and (part is None or not item.gpu_count):
            left_out[
                "an accelerator that its name does not tell for certain" if item.gpu_count else "no accelerator"
            ] += 1
        else:
            key = (cloud, item.instance_name, item.location)
            one = found.get(key) or _offer(key, item, like, part or "", versions.get(item.provider, ""), today)
            found[key] = _priced(one, price, is_spot=bool(item.spot))
    if not found:
        raise PlaitError("refresh: gpuhunt's catalogue has no offer that is understood", hint="nothing was changed")
    clouds = tuple(sorted({cloud for cloud, _, _ in found}))
    return Fetched(offers=tuple(found.values()), clouds=clouds, left_out=dict(left_out))


def _offer(
    key: tuple[str, str, str], item: Any, like: Offer | None, part: str, version: str, today: datetime.date
) -> Offer:
    cloud, name, region = key
    memory = _number(item.memory)
    return Offer(
        cloud=cloud,
        instance_type=name,
        accelerator=part if like is None else like.accelerator,
        count=float(item.gpu_count) if like is None else like.count,
        vcpus=_number(item.cpu),
        memory_bytes=None if memory is None else memory * GIB,
        region=region,
        usd_per_hour=None,
        spot_usd_per_hour=None,
        as_of=_date(version, today),
        source=f"gpuhunt catalogue of {item.provider}{f', version {version}' if version else ''}",
    )


def _priced(offer: Offer, price: float, *, is_spot: bool) -> Offer:
    """With the price in its place; of several (zones, disks) the lowest."""
    before = offer.spot_usd_per_hour if is_spot else offer.usd_per_hour
    lowest = price if before is None else min(before, price)
    return replace(offer, spot_usd_per_hour=lowest) if is_spot else replace(offer, usd_per_hour=lowest)


def _date(version: str, today: datetime.date) -> str:
    """The day that a catalogue's version names (20261103-14, say), else today."""
    match = re.match(r"(20\d\d)-?(\d\d)-?(\d\d)", version)
    try:
        found = datetime.date(*map(int, match.groups())) if match else today
    except ValueError:
        found = today
    return min(found, today).isoformat()


def _number(value: Any) -> float | None:
    """A finite number above zero, else None: an offer for nothing is a mistake."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        return None
    return float(value)


def _parts() -> dict[tuple[str, float | None], str]:
    """(gpuhunt's name in small letters, GB) -> our part, where there is only one."""
    table = rows(DATA / "gpuhunt_parts.csv", ("gpu_name", "gpu_memory_gb", "part"))
    return {(cells["gpu_name"].lower(), float(cells["gpu_memory_gb"])): cells["part"] for _, cells in table}


def merged(known: Sequence[Offer], fetched: Fetched) -> tuple[tuple[Offer, ...], int]:
    """(`known` with what was fetched in its place and beside it, offers kept as they were because the new price jumped).

    What the catalogue does not list stays, with its own date.

    Raises:
        PlaitError: a fifth of the prices that can be compared jumped: the catalogue is broken.
    """
    table = {_key(offer): offer for offer in known}
    compared = jumped = 0
    for offer in fetched.offers:
        if (old := table.get(_key(offer))) is not None:
            ratios = list(_ratios(old, offer))
            compared += bool(ratios)
            if any(not 1 / _JUMP <= ratio <= _JUMP for ratio in ratios):
                jumped += 1
                continue
        table[_key(offer)] = offer
    if jumped and jumped >= 0.2 * compared:
        raise PlaitError(
            f"refresh: {jumped} of {compared} prices are more than {_JUMP:g} times what they were: the catalogue is broken",
            hint="nothing was changed; try again another day",
        )
    return tuple(table.values()), jumped


def _key(offer: Offer) -> tuple[str, str, str, str]:
    return offer.cloud, offer.instance_type, offer.accelerator, offer.region


def _ratios(old: Offer, new: Offer) -> Iterator[float]:
    for name in ("usd_per_hour", "spot_usd_per_hour"):
        before, after = getattr(old, name), getattr(new, name)
        if before and after:
            yield after / before
