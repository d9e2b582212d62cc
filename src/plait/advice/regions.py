"""In which country a cloud's region lies. Where the table does not say, nobody guesses."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from plait.hardware.offers import Offer
from plait.hardware.tables import rows

__all__ = ["AREAS", "country_of", "lies_in"]

_DATA = Path(__file__).parent / "data" / "regions.csv"
# Clouds whose region column is a country's ISO code.
_COUNTRY_CODES = ("runpod", "vast", "primeintellect")
_EU = (  # noqa: SIM905 - the 27 members, as one line
    "AT BE BG HR CY CZ DK EE FI FR DE GR HU IE IT LV LT LU MT NL PL PT RO SK SI ES SE"
).split()
AREAS: dict[str, frozenset[str]] = {
    "eu": frozenset(_EU),
    "eea": frozenset([*_EU, "IS", "LI", "NO"]),
    "us": frozenset(["US"]),
    "uk": frozenset(["GB"]),
}
"""Areas that a need may name beside a country's code or a region's own name."""


@functools.cache
def _table() -> tuple[tuple[str, str, str], ...]:
    found = [(c["cloud"], c["region"], c["country"]) for _, c in rows(_DATA, ("cloud", "region", "country"))]
    return tuple(sorted(found, key=lambda row: -len(row[1])))


def country_of(offer: Offer) -> str | None:
    """ISO code of the country where the offer's machines stand; None: not known (`any`, `hosted`, `default`)."""
    if offer.cloud in _COUNTRY_CODES and re.fullmatch("[A-Z]{2}", offer.region):
        return offer.region
    return next(
        (land for cloud, start, land in _table() if offer.cloud == cloud and offer.region.startswith(start)), None
    )


def lies_in(offer: Offer, area: str) -> tuple[bool, str]:
    """Whether the offer is known to lie in `area` (eu, eea, us, uk, a country's code, a region's name), and why."""
    if offer.region.lower() == area.lower():
        return True, f"region {offer.region}"
    country = country_of(offer)
    if country is None:
        return False, f"the country of {offer.cloud}'s region {offer.region!r} is not known"
    inside = country in AREAS.get(area.lower(), frozenset([area.upper()]))
    return inside, f"{offer.cloud} {offer.region} lies in {country}"
