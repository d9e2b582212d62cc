"""The ranked answers: everything is bounded first, and only what can still be among the answers is searched.

    offers -> filters -> shapes (part, count, instances) -> bound (hours, dollars) -> search, the cheapest bound first

A shape's hours and dollars are never below its bound (`advice/bound.py`), so a search ends when the next bound is not
below the last answer kept and no bound left could still join the front of time and money. Once a part has been
searched, its larger shapes are bounded by that result, too: N times the devices are at most N times as fast (1.02 for
rounding; 1.35 where memory made it recompute, which more devices may end).
"""

from __future__ import annotations

import datetime
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from plait.advice.answer import Answer, answer_of, local_answer
from plait.advice.bound import Counted, Precision, count_work, least_devices, seconds_per_sample
from plait.advice.compatibility import compatibility, training_precision
from plait.advice.filters import Exclusion, parts_unpriced, remaining
from plait.advice.interruptions import expected_hours
from plait.advice.needs import Needs
from plait.advice.shapes import Shape, shapes_of
from plait.advice.work import Work, work_of
from plait.cost.calibration import load_calibration
from plait.errors import HardwareError, PlanError, RequestError
from plait.hardware.catalogue import load_accelerators
from plait.hardware.offers import Offer, load_offers
from plait.plan.search import search
from plait.plan.space import Space
from plait.schema.cluster import Cluster
from plait.schema.graph import Graph

__all__ = ["Advice", "advise"]

HORIZON = 90 * 24.0
"""Hours that a run may take where no deadline is given: three months, about the longest published runs."""
LOCAL = 24.0
"""Hours up to which this computer is the answer."""
EACH = 2
"""Answers of one accelerator that are shown; all of them can be on the front."""
_USUAL = 1.5
"""Found over bound before anything of a part is known: orders what is looked at first, decides nothing."""


def _space(graph: Graph, count: int) -> Space:
    """The plans that are looked at: fewer than `plait plan` does, which costs up to 6 % of a step and saves most of the time.

    Measured on 70 and 405 billion parameters (512 and 2,048 H100, 2026-11-24): the same step, and 5.7 % more, in an
    eighth and a fifteenth of the time.
    """
    long = graph.tokens_per_sample > 8192
    small = count <= 16
    return Space(
        tp=() if small else (1, 2, 4, 8),
        cp=() if long or small else (1,),
        pp=() if small else (1, 2, 3, 4, 6, 8, 12, 16, 32, 64),
        zero=(1, 2, 3) if small else (1, 3),
        schedules=("1f1b", "interleaved"),
        interleave=(2,),
        mixed=False,
        sequence_parallel=("no", "yes") if small else ("yes",),
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    shape: Shape
    precision: Precision
    why: str
    hours: float
    """Not beaten by any plan."""
    usd: float
    """Not beaten by any plan; of the kind of price that is ranked by."""
    delay: float
    """By which interruptions lengthen `hours`, where spot prices are ranked by; else 1."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What was asked, and the answers."""

    graph: Graph
    needs: Needs
    work: Work
    counted: Counted
    answers: tuple[Answer, ...]
    """Best first; all meet the needs."""
    front: tuple[Answer, ...]
    """No other answer is at once faster and cheaper."""
    excluded: tuple[Exclusion, ...]
    unpriced: tuple[str, ...]
    """Parts that train and have no price here: never free, only unknown."""
    failed: tuple[tuple[str, str], ...]
    """(shape, why no plan was found)."""
    bounded: int
    searched: int
    unsearched: int
    """Shapes that could still matter when the time for searching was over."""
    seconds: float
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """The object that `plait advise --json` prints."""
        return {
            "model": self.graph.name,
            "parameters": self.graph.numel,
            "needs": self.needs.to_dict(),
            "work": self.work.to_dict(),
            "answers": [a.summary() for a in self.answers],
            "pareto": [a.summary() for a in self.front],
            "excluded": [e.to_dict() for e in self.excluded],
            "unpriced": list(self.unpriced),
            "failed": [{"shape": name, "reason": why} for name, why in self.failed],
            "bounded": self.bounded,
            "searched": self.searched,
            "unsearched": self.unsearched,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


@dataclass(slots=True)
class _Hunt:
    """One search for answers under way."""

    graph: Graph
    needs: Needs
    work: Work
    counted: Counted
    keep: int
    until: float
    longer: float
    """Seconds that may be spent beyond while there is no answer at all."""
    today: datetime.date
    wants_front: bool = True
    found: list[Answer] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    done: set[Shape] = field(default_factory=set)
    slower: dict[str, float] = field(default_factory=dict)
    """Found over bound, by part: orders what comes next, decides nothing."""
    known: dict[str, list[tuple[Shape, Answer]]] = field(default_factory=dict)

    @property
    def horizon(self) -> float:
        return self.needs.deadline or HORIZON

    def usd(self, answer: Answer) -> float:
        price = answer.price(spot=self.needs.spot)
        return price.usd if price else float("inf")

    def hours(self, answer: Answer) -> float:
        price = answer.price(spot=self.needs.spot)
        return price.hours if price else answer.hours

    def meets(self, answer: Answer) -> bool:
        return self.hours(answer) <= self.horizon and (
            self.needs.budget is None or self.usd(answer) <= self.needs.budget
        )

    def can_meet(self, c: _Candidate) -> bool:
        return c.hours <= self.horizon and (self.needs.budget is None or c.usd <= self.needs.budget)

    def tightened(self, c: _Candidate) -> _Candidate:
        """`c` with the bound that smaller shapes of its part give, on no worse a network."""
        hours = c.hours
        for shape, answer in self.known.get(c.shape.part.name, ()):
            if shape.count <= c.shape.count and shape.per_instance >= c.shape.per_instance:
                plan = answer.estimate.plan
                gain = 1.02 if plan.recompute == "none" and not plan.recompute_segments else 1.35
                hours = max(hours, answer.hours * shape.count / c.shape.count / gain * c.delay)
        return c if hours == c.hours else replace(c, hours=hours, usd=c.usd * hours / c.hours)

    def key(self, answer: Answer) -> tuple[float, float]:
        usd, hours = self.usd(answer), self.hours(answer)
        return (usd, hours) if self.needs.minimize == "usd" else (hours, usd)

    def good(self) -> list[Answer]:
        return sorted((a for a in self.found if self.meets(a)), key=self.key)

    def matters(self, c: _Candidate, good: Sequence[Answer]) -> bool:
        """Whether `c` could still be among the answers kept, or on the front, given the `good` ones so far."""
        bound = c.usd if self.needs.minimize == "usd" else c.hours
        own = [a for a in good if a.accelerator == c.shape.part.name]
        kept = varied(good)
        if (len(own) < EACH or bound < self.key(own[EACH - 1])[0]) and (
            len(kept) < self.keep or bound < self.key(kept[self.keep - 1])[0]
        ):
            return True
        return self.wants_front and not any(self.usd(a) <= c.usd and self.hours(a) <= c.hours for a in good)

    def guess(self, c: _Candidate) -> tuple[float, float]:
        """What is taken first: the value that the part's other shapes suggest."""
        factor = self.slower.get(c.shape.part.name, _USUAL)
        late = factor * c.hours > self.horizon
        usd, hours = factor * c.usd + (1e15 if late else 0.0), factor * c.hours
        return (usd, c.shape.count) if self.needs.minimize == "usd" else (hours, usd)

    def run(self, candidates: Sequence[_Candidate], most: int | None = None) -> int:
        """Searches what matters; the number of candidates that were left when the time was over."""
        left = [c for c in candidates if c.shape not in self.done]
        began = len(self.done)
        while left and (most is None or len(self.done) - began < most):
            good = self.good()
            left = [c for c in map(self.tightened, left) if self.can_meet(c) and self.matters(c, good)]
            if not left or time.perf_counter() > self.until + (0.0 if good else self.longer):
                break
            c = min(left, key=self.guess)
            left.remove(c)
            self.look(c)
        return len(left)

    def look(self, c: _Candidate) -> None:
        """Searches one shape."""
        self.done.add(c.shape)
        try:
            cluster = c.shape.cluster()
            best = search(
                self.graph,
                cluster,
                batch=self.work.batch,
                precision=c.precision,
                top=1,
                space=_space(self.graph, c.shape.count),
            ).estimate
            told = compatibility(c.shape.part, self.counted, c.precision, c.why)
        except (HardwareError, PlanError) as problem:
            self.failed.append((f"{c.shape.count}x{c.shape.part.name}", problem.message.splitlines()[0]))
            return
        answer = answer_of(c.shape, best, self.graph, self.work, self.needs, told, self.today)
        self.slower[answer.accelerator] = max(1.0, answer.hours * c.delay / c.hours)
        self.found.append(answer)
        self.known.setdefault(answer.accelerator, []).append((c.shape, answer))


def advise(
    graph: Graph,
    needs: Needs,
    *,
    own_batch: int = 1,
    offers: Sequence[Offer] | None = None,
    local: Cluster | None = None,
    keep: int = 8,
    seconds: float = 12.0,
    today: datetime.date | None = None,
) -> Advice:
    """The `keep` best answers to `needs` for training `graph`, and the front of time and money.

    `local` is this computer, if it has been probed; after `seconds` of searching what is left is only counted.

    Raises:
        RequestError: needs clash, or no offer meets budget and deadline; the message has the nearest.
    """
    began = time.perf_counter()
    today = today or datetime.datetime.now(datetime.UTC).date()
    work = work_of(graph, needs, own_batch)
    counted = count_work(graph)
    offers = load_offers() if offers is None else offers
    filtered = remaining(offers, needs, counted)
    candidates = _candidates(filtered.offers, offers, graph, needs, work, counted)
    hunt = _Hunt(graph, needs, work, counted, keep, began + seconds, seconds, today)
    notes: list[str] = []
    here = _here(graph, needs, work, counted, local, notes)
    feasible = [c for c in candidates if hunt.can_meet(c)]
    unsearched = hunt.run(feasible)
    answers = hunt.good()
    if not answers and here is None:
        answers = _longer(hunt, candidates, notes)
    if here is not None:
        answers = [here, *answers]
    if any(not spec.trainable for spec in graph.parameters):
        notes.append("frozen parameters are counted as if they were trained: memory and time are upper limits")
    return Advice(
        graph=graph,
        needs=needs,
        work=work,
        counted=counted,
        answers=tuple(varied(answers)[:keep]),
        front=_front(hunt, answers),
        excluded=filtered.excluded,
        unpriced=parts_unpriced(needs, offers),
        failed=tuple(hunt.failed),
        bounded=len(candidates),
        searched=len(hunt.done),
        unsearched=unsearched,
        seconds=time.perf_counter() - began,
        notes=tuple(notes),
    )


def varied(answers: Sequence[Answer]) -> list[Answer]:
    """The answers in their order, at most `EACH` of one accelerator: more would hide the other parts."""
    counts: Counter[str] = Counter()
    kept = []
    for answer in answers:
        counts[answer.accelerator] += 1
        if counts[answer.accelerator] <= EACH:
            kept.append(answer)
    return kept


def _candidates(
    offers: Sequence[Offer], everything: Sequence[Offer], graph: Graph, needs: Needs, work: Work, counted: Counted
) -> list[_Candidate]:
    """Every shape with the hours and dollars that no plan beats."""
    calibration = load_calibration()
    samples = work.tokens / graph.tokens_per_sample
    least: dict[str, int] = {}
    each: dict[str, tuple[Precision, str, float]] = {}
    for name in dict.fromkeys(offer.accelerator for offer in offers):
        part = load_accelerators()[name]
        precision, why = training_precision(part)
        if precision is None:
            continue  # filters have left it out already
        least[name] = least_devices(counted, part.device, precision, calibration)
        each[name] = precision, why, seconds_per_sample(counted, part.device, precision, calibration)
    found = []
    enough = min(1.0, needs.deadline or 1.0)
    alone = {name: samples * seconds / 3600 for name, (_, _, seconds) in each.items()}
    for shape in shapes_of(offers, least, alone, work.batch, everything, enough):
        precision, why, seconds = each[shape.part.name]
        hourly = shape.hourly(spot=needs.spot)
        if hourly is None:
            continue
        delay = 1.0
        if needs.spot:
            delay = expected_hours(
                1.0,
                instances=shape.instances,
                per_day=needs.interruptions_per_day,
                checkpoint_minutes=needs.checkpoint_minutes,
                restart_minutes=needs.restart_minutes,
            )
        hours = samples * seconds / shape.count / 3600 * delay
        found.append(_Candidate(shape, precision, why, hours, hours * hourly[0], delay))
    return found


def _here(
    graph: Graph, needs: Needs, work: Work, counted: Counted, local: Cluster | None, notes: list[str]
) -> Answer | None:
    """This computer, where the model fits and is done soon; a note where that is not known."""
    if needs.only or needs.clouds or needs.require:
        return None
    if local is None:
        # A day at 1 TFLOP/s, which few CPUs exceed: only decides whether the note is shown.
        if counted.flops * work.tokens / graph.tokens_per_sample < 24 * 3600 * 1e12:
            notes.append(
                "a model this small may not need an accelerator: run `plait hardware probe` once, and this computer is compared"
            )
        return None
    limit = min(LOCAL, needs.deadline or LOCAL)
    try:
        device = local.groups[0].device
        least = seconds_per_sample(counted, device, "fp32", load_calibration()) / local.devices
        hours = least * work.tokens / graph.tokens_per_sample / 3600
        if hours > limit:
            notes.append(f"this computer's CPU would need more than {hours:,.0f} hours")
            return None
        found = search(graph, local, batch=work.batch, top=1, space=_space(graph, local.devices)).estimate
    except (HardwareError, PlanError) as problem:
        notes.append(f"this computer: {problem.message.splitlines()[0]}")
        return None
    answer = local_answer(found, graph, work)
    if answer.hours > limit:
        notes.append(f"this computer's CPU would need about {answer.hours:,.0f} hours")
        return None
    return answer


def _longer(hunt: _Hunt, candidates: Sequence[_Candidate], notes: list[str]) -> list[Answer]:
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
    if needs.budget is None and needs.deadline is None:
        hunt.needs = replace(needs, deadline=1e9)
        hunt.until = time.perf_counter() + hunt.longer
        hunt.run(candidates)
        if answers := hunt.good():
            notes.append(f"nothing that was searched finishes within {HORIZON / 24:.0f} days; the answers take longer")
            return answers
        why = "; ".join(f"{name}: {reason}" for name, reason in hunt.failed[:3])
        raise RequestError(
            f"no offer can hold and train {hunt.graph.name}: {why}",
            hint="a smaller batch, a smaller model, or parts with more memory (--only)",
        )
    raise _nearest(hunt, candidates)


def _best(hunt: _Hunt, candidates: Sequence[_Candidate], **changes: Any) -> Answer | None:
    """The one best answer under other needs, with what the hunt knows already."""
    other = replace(hunt, needs=replace(hunt.needs, **changes), keep=1, wants_front=False)
    other.until, other.longer = time.perf_counter() + hunt.longer / 4, hunt.longer / 2
    other.run(candidates)
    return next(iter(other.good()), None)


def _nearest(hunt: _Hunt, candidates: Sequence[_Candidate]) -> RequestError:
    """The error when no offer meets budget and deadline: what is nearest to each."""
    needs = hunt.needs

    def text(what: str, a: Answer | None) -> str:
        if a is None:
            return ""
        price = a.price(spot=needs.spot)
        where = f" at {price.offer.cloud} ({price.offer.instance_type})" if price else ""
        return f"{what} {a.name}{where}: {hunt.hours(a):,.1f} h, ${hunt.usd(a):,.2f}"

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
    if needs.budget is not None and affordable is None:
        hints.append(text("cheapest of all", _best(hunt, candidates, budget=None, deadline=1e9, minimize="usd")))
    shown = list(dict.fromkeys(hint for hint in hints if hint))
    head = " and ".join(stated)
    if in_time is not None and affordable is not None:
        return RequestError(f"{head} clash: each can be met, not both", hint="; ".join(shown))
    why = "; ".join(f"{name}: {reason}" for name, reason in hunt.failed[:3])
    return RequestError(f"no offer meets {head}", hint="; ".join(shown) or f"nothing could be estimated: {why}")


def _front(hunt: _Hunt, answers: Sequence[Answer]) -> tuple[Answer, ...]:
    """Answers that no other one beats in time and money, fastest first."""
    front: list[Answer] = []
    for answer in sorted(answers, key=lambda a: (hunt.hours(a), hunt.usd(a))):
        priced = answer.on_demand or answer.spot
        usd = hunt.usd(answer) if priced else 0.0
        if all(usd < (hunt.usd(other) if other.on_demand or other.spot else 0.0) for other in front):
            front.append(answer)
    return tuple(front)
