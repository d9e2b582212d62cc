"""What is nearest, where no offer meets budget, deadline or the usual length of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from plait.advice.answer import Answer, length
from plait.advice.hunt import HORIZON, Candidate, Hunt
from plait.advice.shapes import LARGEST
from plait.errors import RequestError

__all__ = ["nearest_or_longer"]

_LONGER = 2.0
"""Times the fastest: as long as answers may take where nothing finishes within the usual horizon."""
_NEVER = 100 * 365.25 * 24.0
"""Hours beyond which nothing is an answer."""


def nearest_or_longer(hunt: Hunt, candidates: Sequence[Candidate], notes: list[str]) -> list[Answer]:
    """The answers where nothing meets the needs: none where a need was stated, else those that take longest.

    Raises:
        RequestError: with what is nearest.
    """
    if not candidates:
        raise RequestError(
            f"no offer that meets the needs can hold {hunt.graph.name}: weights, gradients and optimizer alone need more "
            "accelerators than one instance has, and such instances are not known to be joined",
            hint="drop one of --require, --clouds, --only, or take a smaller model",
        )
    needs = hunt.needs
    if all(math.isinf(c.hours) for c in candidates):
        raise RequestError(
            f"no spot offer finishes: {needs.interruptions_per_day:g} interruptions a day of each instance come faster "
            "than the work between them",
            hint="leave out --spot, or lower --checkpoint-minutes or --interruptions-per-day",
        )
    soonest = min(c.hours for c in candidates)
    if soonest > _NEVER:
        raise RequestError(
            f"no offer finishes: {hunt.work.tokens:.3g} {hunt.work.unit} would take more than {_NEVER / 8766:,.0f} years",
            hint=f"at least {soonest / 8766:.3g} years on {LARGEST:,} accelerators at most; give fewer --tokens",
        )
    if needs.budget is None and needs.deadline is None:
        fastest = _best(hunt, candidates, deadline=_NEVER, minimize="time")
        if fastest is None:
            why = "; ".join(f"{name}: {reason}" for name, reason in hunt.failed[:3])
            raise RequestError(
                f"no offer can hold and train {hunt.graph.name}: {why or 'none was searched in time'}",
                hint="a smaller batch, a smaller model, or parts with more memory (--only)",
            )
        # Cheaper ones that take years longer are no answers.
        limit = max(HORIZON, _LONGER * hunt.hours(fastest))
        hunt.needs = replace(needs, deadline=limit)
        hunt.until = time.perf_counter() + hunt.longer / 2
        hunt.run([c for c in candidates if hunt.can_meet(c)])
        late = hunt.hours(fastest) > HORIZON
        notes.append(
            f"nothing that was searched finishes within {HORIZON / 24:,.0f} days; the answers take up to {limit / 24:,.0f}"
            if late
            else f"the answers are those that were found within {HORIZON / 24:,.0f} days"
        )
        return hunt.good()
    raise _nearest(hunt, candidates)


def _best(hunt: Hunt, candidates: Sequence[Candidate], **changes: Any) -> Answer | None:
    """The one best answer under other needs, with what the hunt knows already."""
    other = replace(hunt, needs=replace(hunt.needs, **changes), keep=1, wants_front=False)
    other.until, other.longer = time.perf_counter() + hunt.longer / 4, hunt.longer / 2
    other.run(candidates)
    return next(iter(other.good()), None)


def _nearest(hunt: Hunt, candidates: Sequence[Candidate]) -> RequestError:
    """The error when no offer meets budget and deadline: what is nearest to each."""
    needs = hunt.needs

    def text(what: str, a: Answer | None) -> str:
        if a is None:
            return ""
        price = a.price(spot=needs.spot)
        where = f" at {price.offer.cloud} ({price.offer.instance_type})" if price else ""
        return f"{what} {a.name}{where}: {length(hunt.hours(a))}, ${hunt.usd(a):,.2f}"

    in_time = affordable = None
    stated = []
    if needs.budget is not None:
        stated.append(f"--budget {needs.budget:g}")
        in_time = _best(hunt, candidates, budget=None, minimize="usd")
        affordable = _best(hunt, candidates, deadline=1e9, minimize="time")
    if needs.deadline is not None:
        stated.append(f"--deadline {needs.deadline:g}")
    elif affordable is not None:
        stated.append(f"the {HORIZON / 24:.0f} days that hold without --deadline")
    within = f"within {hunt.horizon:g} h"
    hints = [text(f"cheapest {within}", in_time), text("fastest within the budget", affordable)]
    if in_time is None:
        hints.append(text("fastest of all", _best(hunt, candidates, budget=None, deadline=1e9, minimize="time")))
    if needs.budget is not None and affordable is None and (needs.deadline is not None or in_time is None):
        hints.append(text("cheapest of all", _best(hunt, candidates, budget=None, deadline=1e9, minimize="usd")))
    shown = list(dict.fromkeys(hint for hint in hints if hint))
    head = " and ".join(stated)
    if in_time is not None and affordable is not None:
        return RequestError(f"{head} clash: each can be met, not both", hint="; ".join(shown))
    why = "; ".join(f"{name}: {reason}" for name, reason in hunt.failed[:3])
    return RequestError(f"no offer meets {head}", hint="; ".join(shown) or f"nothing could be estimated: {why}")
