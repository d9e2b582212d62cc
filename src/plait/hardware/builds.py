"""Which families no build of PyTorch runs on (any more), or only a special one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from plait.hardware.catalogue import Accelerator
from plait.hardware.tables import DATA, choice, rows
from plait.schema.records import Record

__all__ = ["Build", "build_for"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Build(Record):
    """What has to be known of PyTorch on one family."""

    runs: bool
    says: str
    source: str


@functools.cache
def _table() -> dict[str, Build]:
    return {
        c["family"]: Build(runs=choice(where, c, "runs", ("no", "special")) != "no", says=c["says"], source=c["source"])
        for where, c in rows(DATA / "builds.csv", ("family", "runs", "says", "source"))
    }


def build_for(part: Accelerator) -> Build | None:
    """What is special about PyTorch on `part`; None where its usual build runs, as far as is known."""
    return _table().get(part.device.family)
