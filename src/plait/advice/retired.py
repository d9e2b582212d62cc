"""Products that are no longer there answer with what took their place, and why."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from plait.errors import RequestError
from plait.hardware.tables import rows
from plait.schema.records import Record

__all__ = ["Retired", "refuse_retired", "retired"]

_DATA = Path(__file__).parent / "data" / "retired.csv"


@dataclass(frozen=True, kw_only=True, slots=True)
class Retired(Record):
    """One product that is no longer there."""

    name: str
    year: str
    successor: str
    reason: str
    source: str


@functools.cache
def _table() -> dict[str, Retired]:
    found: dict[str, Retired] = {}
    for _, cells in rows(_DATA, ("name", "words", "retired", "successor", "reason", "source")):
        product = Retired(
            name=cells["name"],
            year=cells["retired"],
            successor=cells["successor"],
            reason=cells["reason"],
            source=cells["source"],
        )
        for word in (cells["name"], *cells["words"].split(";")):
            found[_key(word)] = product
    return found


def _key(word: str) -> str:
    return re.sub(r"[\s_-]+", " ", word.strip().lower())


def retired(word: str) -> Retired | None:
    """The retired product that `word` names; None where it names none."""
    return _table().get(_key(word))


def refuse_retired(word: str) -> None:
    """Refuse a retired product with its successor.

    Raises:
        RequestError: `word` names one.
    """
    product = retired(word.strip().removeprefix("hf:"))
    if product is not None:
        raise RequestError(
            f"{product.name} has been retired ({product.year}): {product.reason}",
            hint=f"its successor is {product.successor} (source: {product.source})",
        )
