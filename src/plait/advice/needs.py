"""What a person wants done and under which conditions, checked when it is stated."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from plait.advice.retired import refuse_retired
from plait.advice.security import NEEDS
from plait.errors import RequestError
from plait.hardware.catalogue import find, load_accelerators
from plait.schema.records import Record

__all__ = ["Needs", "amount", "parts_named"]

_LEAVE_OUT = "or leave it out: the answer says what is then assumed"
_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def amount(option: str, text: str) -> float:
    """The number in `text`; 1.5T, 300B, 20M and 5k are understood.

    Raises:
        RequestError: it is no number above 0.
    """
    word = text.strip().replace("_", "").replace(",", "")
    scale = _SCALES.get(word[-1:].lower(), 1.0)
    try:
        value = float(word[:-1] if scale > 1 else word) * scale
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise RequestError(f"{option} {text!r} is not a number above 0", hint="write for example 1.4T, 300B, 2e9 or 72")
    return value


def parts_named(word: str) -> frozenset[str]:
    """Accelerators called `word`: a name, an alias or a family (Hopper).

    Raises:
        RequestError: there is none (the nearest names are in the hint), or it has been retired.
    """
    refuse_retired(word)
    family = [p.name for p in load_accelerators().values() if p.device.family.lower() == word.strip().lower()]
    return frozenset(family or [find(word).name])


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs(Record):
    """What is wanted. Dollars, hours, minutes and days as people state them; everything else in SI."""

    task: str = "train"
    tokens: float | None = None
    """Positions (samples where a sample has no sequence) to train on; None: a stated default."""
    batch: int | None = None
    """Global batch in samples; None: a stated default."""
    budget: float | None = None
    """Dollars."""
    deadline: float | None = None
    """Hours."""
    minimize: str = "usd"
    spot: bool = False
    """Rank and hold the budget against spot prices with their interruptions."""
    clouds: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    checkpoint_minutes: float = 30.0
    restart_minutes: float = 10.0
    interruptions_per_day: float = 0.2
    """Of one instance. An assumption without a source: clouds publish bands at best."""
    grid_kg_per_kwh: float | None = None

    def __post_init__(self) -> None:
        if self.task == "serve":
            raise RequestError(
                "--task serve is not built yet: latency and throughput of prefill and decode are not estimated",
                hint="--task train and --task finetune (all parameters) are",
            )
        if self.task not in ("train", "finetune"):
            raise RequestError(
                f"--task {self.task!r} is not one of train, finetune", hint="finetune is of all parameters"
            )
        if self.minimize not in ("usd", "time"):
            raise RequestError(f"--minimize {self.minimize!r} is not one of usd, time", hint="usd is the default")
        for name in ("tokens", "batch", "budget", "deadline", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise RequestError(f"--{name.replace('_', '-')} {value:g} must be above 0", hint=_LEAVE_OUT)
        for name in ("restart_minutes", "interruptions_per_day", "grid_kg_per_kwh"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise RequestError(f"--{name.replace('_', '-')} {value:g} must be 0 or above", hint=_LEAVE_OUT)
        for need in self.require:
            known = need in NEEDS if not need.startswith("region=") else bool(need.removeprefix("region="))
            if not known or need == "region=":
                near = difflib.get_close_matches(need, NEEDS, n=2, cutoff=0.4)
                raise RequestError(
                    f"--require {need!r} is not a need that plait knows",
                    hint=(f"nearest: {', '.join(near)}; " if near else "") + f"known: {', '.join(NEEDS)}",
                )
        wanted, unwanted = self.wanted(), self.unwanted()
        if self.only and not wanted - unwanted:
            raise RequestError(
                f"--only {','.join(self.only)} and --avoid {','.join(self.avoid)} clash: nothing is left",
                hint="drop one of the two",
            )

    def wanted(self) -> frozenset[str]:
        """Names of the parts in `only`, all where it is empty."""
        return frozenset().union(*(parts_named(w) for w in self.only)) if self.only else frozenset(load_accelerators())

    def unwanted(self) -> frozenset[str]:
        """Names of the parts in `avoid`."""
        return frozenset().union(*(parts_named(w) for w in self.avoid))
