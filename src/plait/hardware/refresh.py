"""Newer tables of accelerators and offers, checked before they are used in place of the shipped ones."""

from __future__ import annotations

import csv
import datetime
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from plait.errors import HardwareError, PlaitError
from plait.hardware import catalogue, offers
from plait.hardware.catalogue import load_accelerators
from plait.hardware.offers import COLUMNS, OLD, Offer, days_old, load_offers, read_offers
from plait.hardware.prices import fetch, merged
from plait.hardware.tables import DATA, own_folder, table_path
from plait.units import GIB

__all__ = ["ages", "install", "refresh"]


def refresh(today: datetime.date | None = None) -> dict[str, Any]:
    """Today's prices through gpuhunt in place of the present ones; what was taken, and what was left out.

    Raises:
        RequestError: gpuhunt is not installed.
        PlaitError: no catalogue could be read, or it is broken. The present table stays in use.
    """
    today = today or datetime.datetime.now(tz=datetime.UTC).date()
    known = load_offers()
    try:
        found = fetch(known, today)
        table, jumped = merged(known, found)
    except PlaitError as problem:
        newest = ages(today)["newest_price"]
        hint = f"{problem.hint}\nthe present prices are of {newest} at the newest"
        raise type(problem)(problem.message, hint=hint) from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "offers.csv"
        _write(path, table)
        install(offers=path)
    left_out = dict(found.left_out)
    if jumped:
        left_out["a price that jumped more than tenfold (the old one is kept)"] = jumped
    return {"updated": len(found.offers) - jumped, "clouds": list(found.clouds), "left_out": left_out}


def _write(path: Path, table: Sequence[Offer]) -> None:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.10g}"

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for o in table:
            memory = None if o.memory_bytes is None else o.memory_bytes / GIB
            writer.writerow(
                [o.cloud, o.instance_type, o.accelerator, text(o.count), text(o.vcpus), text(memory), o.region,
                 text(o.usd_per_hour), text(o.spot_usd_per_hour), o.as_of, o.source]
            )  # fmt: skip


def install(*, accelerators: Path | None = None, offers: Path | None = None) -> None:
    """Checks the tables and keeps copies that are read from now on: whole, or not at all.

    Raises:
        HardwareError: a table is unreadable, a figure in it is absurd, or the two do not fit each other; nothing is
            changed then.
    """
    parts = load_accelerators(accelerators) if accelerators is not None else load_accelerators()
    checked = read_offers(offers or table_path("offers.csv"), parts)
    if not checked:
        raise HardwareError(f"{offers or table_path('offers.csv')}: it has no offers")
    folder = own_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            moves = []
            for source, name in ((accelerators, "accelerators.csv"), (offers, "offers.csv")):
                if source is not None:
                    handle, aside = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
                    os.close(handle)
                    stack.callback(Path(aside).unlink, missing_ok=True)
                    shutil.copyfile(source, aside)
                    moves.append((aside, folder / name))
            for aside, target in moves:
                Path(aside).replace(target)
    except OSError as problem:
        raise HardwareError(f"{folder}: {problem.strerror}: the newer tables cannot be kept there") from None
    _forget()


def _forget() -> None:
    """What this process has read of the old tables."""
    for cached in (catalogue.load_accelerators, catalogue._words_of_parts, offers.load_offers):
        cached.cache_clear()


def ages(today: datetime.date | None = None) -> dict[str, Any]:
    """Which tables are read, the newest and oldest date of a price, and how many are older than 90 days or undated."""
    today = today or datetime.datetime.now(tz=datetime.UTC).date()
    table = load_offers()
    days = [days_old(offer.as_of, today) for offer in table]
    dates = sorted(offer.as_of for offer in table if days_old(offer.as_of, today) is not None)
    own = {name: (own_folder() / name).is_file() for name in ("accelerators.csv", "offers.csv")}
    return {
        "tables": {name: str(own_folder() / name if mine else DATA / name) for name, mine in own.items()},
        "accelerators": len(load_accelerators()),
        "offers": len(table),
        "oldest_price": dates[0] if dates else None,
        "newest_price": dates[-1] if dates else None,
        "older_than_90_days": sum(1 for value in days if value is not None and value > OLD),
        "without_a_date": days.count(None),
    }
