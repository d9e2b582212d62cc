"""Newer tables of accelerators and offers, checked before they are used in place of the shipped ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from plait.hardware.catalogue import load_accelerators
from plait.hardware.offers import load_offers
from plait.hardware.tables import DATA, own_folder

__all__ = ["ages", "install"]


def install(*, accelerators: Path | None = None, offers: Path | None = None) -> None:
    """Checks the tables and keeps copies that are read from now on.

    Raises:
        HardwareError: a table is unreadable or a figure in it is absurd; nothing is changed then.
    """
    if accelerators is not None:
        load_accelerators(accelerators)
    if offers is not None:
        load_offers(offers)
    folder = own_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for source, name in ((accelerators, "accelerators.csv"), (offers, "offers.csv")):
        if source is not None:
            shutil.copyfile(source, folder / name)


def ages() -> dict[str, Any]:
    """Which tables are read and the newest and oldest date of a price."""
    dates = sorted(offer.as_of for offer in load_offers() if offer.as_of[:2] == "20")
    own = {name: (own_folder() / name).is_file() for name in ("accelerators.csv", "offers.csv")}
    return {
        "tables": {name: str(own_folder() / name if mine else DATA / name) for name, mine in own.items()},
        "accelerators": len(load_accelerators()),
        "offers": len(load_offers()),
        "oldest_price": dates[0] if dates else None,
        "newest_price": dates[-1] if dates else None,
    }
