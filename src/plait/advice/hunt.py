"""Searching what can still be among the answers, the most promising shape first, until nothing left matters."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from plait.advice.answer import Answer, answer_of
from plait.advice.bound import Counted, Precision
from plait.advice.compatibility import compatibility
from plait.advice.needs import Needs
from plait.advice.shapes import Shape
from plait.advice.work import Work
from plait.errors import HardwareError, PlanError
from plait.plan.search import search
from plait.plan.space import Space
from plait.schema.graph import Graph

__all__ = ["HORIZON", "Candidate", "Hunt", "few_plans", "varied"]

HORIZON = 90 * 24.0
"""Hours that a run may take where no deadline is given: three months, about the longest published runs."""
EACH = 2
"""Answers of one accelerator that are shown; all of them can be on the front."""
_USUAL = 1.5
"""Found over bound before anything of a part is known: orders what is looked at first, decides nothing."""


def few_plans(graph: Graph, count: int, *, runnable: bool = False, experts: bool = True) -> Space:
    """The plans that are looked at: fewer than `plait plan` does, which costs up to 6 % of a step and saves most of the time.

    `runnable`: those that plait's runtime executes, and expert parallelism where `experts` says so: it executes none, but
    hundreds of experts without it cost five times as much. Otherwise tensor parallelism above 16 devices comes with sequence
    parallelism, which saves 1 % on 70 billion parameters and 9 % on 405 (2026-11-24).

    Measured on 70 and 405 billion parameters (512 and 2,048 H100, 2026-11-24): the same step, and 5.7 % more, in an
    eighth and a fifteenth of the time.
    """
    long = graph.tokens_per_sample > 8192
    small = count <= 16
    return Space(
        tp=() if small else (1, 2, 4, 8),
        cp=() if long and not runnable else (1,),
        pp=() if small else (1, 2, 3, 4, 6, 8, 12, 16, 32, 64),
        zero=(1, 2, 3) if small else (1, 3),
        schedules=("1f1b", "interleaved"),
        interleave=(2,),
        mixed=False,
        sequence_parallel=("no",) if small or runnable else ("yes",),
        executable=runnable and not experts,
    )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shape and what no plan on it can beat."""

    shape: Shape
    precision: Precision
    why: str
    hours: float
    """Not beaten by any plan."""
    usd: float
    """Not beaten by any plan; of the kind of price that is ranked by."""
    delay: float
    """By which interruptions lengthen `hours`, where spot prices are ranked by; else 1."""


@dataclass(slots=True)
class Hunt:
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
        """Hours that a run may take."""
        return self.needs.deadline or HORIZON

    def usd(self, answer: Answer) -> float:
        """Dollars that are ranked by; infinite where there is no such price."""
        price = answer.price(spot=self.needs.spot)
        return price.usd if price else float("inf")

    def hours(self, answer: Answer) -> float:
        """Hours that are ranked by, expected interruptions included where spot prices are."""
        price = answer.price(spot=self.needs.spot)
        return price.hours if price else answer.hours

    def meets(self, answer: Answer) -> bool:
        """Whether an answer keeps to budget and horizon."""
        return self.hours(answer) <= self.horizon and (
            self.needs.budget is None or self.usd(answer) <= self.needs.budget
        )

    def can_meet(self, c: Candidate) -> bool:
        """Whether the bound leaves room for that."""
        return c.hours <= self.horizon and (self.needs.budget is None or c.usd <= self.needs.budget)

    def tightened(self, c: Candidate) -> Candidate:
        """`c` with the bound that smaller shapes of its part give, on no worse a network."""
        hours = c.hours
        for shape, answer in self.known.get(c.shape.part.name, ()):
            if shape.count <= c.shape.count and shape.per_instance >= c.shape.per_instance:
                plan = answer.estimate.plan
                gain = 1.02 if plan.recompute == "none" and not plan.recompute_segments else 1.35
                hours = max(hours, answer.hours * shape.count / c.shape.count / gain * c.delay)
        return c if hours == c.hours else replace(c, hours=hours, usd=c.usd * hours / c.hours)

    def key(self, answer: Answer) -> tuple[float, float]:
        """What answers are ranked by."""
        usd, hours = self.usd(answer), self.hours(answer)
        return (usd, hours) if self.needs.minimize == "usd" else (hours, usd)

    def good(self) -> list[Answer]:
        """The answers that meet the needs, best first."""
        return sorted((a for a in self.found if self.meets(a)), key=self.key)

    def matters(self, c: Candidate, good: Sequence[Answer]) -> bool:
        """Whether `c` could still be among the answers kept, or on the front, given the `good` ones so far."""
        bound = c.usd if self.needs.minimize == "usd" else c.hours
        own = [a for a in good if a.accelerator == c.shape.part.name]
        kept = varied(good)
        if (len(own) < EACH or bound < self.key(own[EACH - 1])[0]) and (
            len(kept) < self.keep or bound < self.key(kept[self.keep - 1])[0]
        ):
            return True
        return self.wants_front and not any(self.usd(a) <= c.usd and self.hours(a) <= c.hours for a in good)

    def guess(self, c: Candidate) -> tuple[float, float]:
        """What is taken first: the value that the part's other shapes suggest."""
        factor = self.slower.get(c.shape.part.name, _USUAL)
        late = factor * c.hours > self.horizon
        usd, hours = factor * c.usd + (1e15 if late else 0.0), factor * c.hours
        return (usd, c.shape.count) if self.needs.minimize == "usd" else (hours, usd)

    def run(self, candidates: Sequence[Candidate], most: int | None = None) -> int:
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

    def look(self, c: Candidate) -> None:
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
                space=few_plans(
                    self.graph, c.shape.count, runnable=self.needs.runnable, experts=not self.needs.runnable_only
                ),
            ).estimate
            told = compatibility(c.shape.part, self.counted, c.precision, c.why, self.needs.precision)
        except (HardwareError, PlanError) as problem:
            self.failed.append((f"{c.shape.count}x{c.shape.part.name}", problem.message.splitlines()[0]))
            return
        answer = answer_of(c.shape, best, self.graph, self.work, self.needs, told, self.today)
        self.slower[answer.accelerator] = max(1.0, answer.hours * c.delay / c.hours)
        self.found.append(answer)
        self.known.setdefault(answer.accelerator, []).append((c.shape, answer))


class _OfPart(Protocol):
    @property
    def accelerator(self) -> str: ...


_T = TypeVar("_T", bound=_OfPart)


def varied(answers: Sequence[_T]) -> list[_T]:
    """The answers in their order, at most `EACH` of one accelerator: more would hide the other parts."""
    counts: Counter[str] = Counter()
    kept = []
    for answer in answers:
        counts[answer.accelerator] += 1
        if counts[answer.accelerator] <= EACH:
            kept.append(answer)
    return kept
