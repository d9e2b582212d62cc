"""The ranked answers: everything is bounded first, and only what can still be among the answers is searched.

    offers -> filters -> shapes (part, count, instances) -> bound (hours, dollars) -> search, the cheapest bound first

A shape's hours and dollars are never below its bound (`advice/bound.py`), so a search ends when the next bound is not
below the last answer kept and no bound left could still join the front of time and money. Once a part has been
searched, its larger shapes are bounded by that result, too: N times the devices are at most N times as fast (1.02 for
rounding; 1.35 where memory made it recompute, which more devices may end).
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plait.advice.answer import Answer, local_answer
from plait.advice.bound import Counted, Precision, count_work, least_devices, seconds_per_sample
from plait.advice.compatibility import at_tf32, training_precision
from plait.advice.filters import Exclusion, cannot_train, parts_unpriced, remaining
from plait.advice.hunt import Candidate, Hunt, few_plans, varied
from plait.advice.interruptions import expected_hours
from plait.advice.nearest import nearest_or_longer
from plait.advice.needs import Needs
from plait.advice.security import is_encrypted_between
from plait.advice.shapes import shapes_of
from plait.advice.trainable import with_trainable
from plait.advice.work import Work, as_samples, work_of
from plait.cost.calibration import load_calibration
from plait.errors import HardwareError, PlanError
from plait.hardware.catalogue import Accelerator, load_accelerators
from plait.hardware.offers import Offer, load_offers
from plait.plan.search import search
from plait.schema.cluster import Cluster
from plait.schema.graph import Graph
from plait.units import format_count

__all__ = ["Advice", "advise"]

LOCAL = 24.0
"""Hours up to which this computer is the answer."""


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


def advise(
    graph: Graph,
    needs: Needs,
    *,
    own_batch: int = 1,
    offers: Sequence[Offer] | None = None,
    local: Cluster | None = None,
    keep: int = 8,
    seconds: float = 10.0,
    today: datetime.date | None = None,
) -> Advice:
    """The `keep` best answers to `needs` for training `graph`, and the front of time and money.

    `local` is this computer, if it has been probed; after `seconds` of searching what is left is only counted.

    Raises:
        RequestError: needs clash, or no offer meets budget and deadline; the message has the nearest.
    """
    began = time.perf_counter()
    today = today or datetime.datetime.now(datetime.UTC).date()
    graph = as_samples(with_trainable(graph, needs.trainable))
    work = work_of(graph, needs, own_batch)
    counted = count_work(graph)
    offers = load_offers() if offers is None else offers
    free = replace(needs, precision="", any_plan=bool(needs.precision) or needs.any_plan, runnable_only=False)
    filtered = remaining(
        offers, needs, lambda name: cannot_train(name, counted, free), lambda name: cannot_train(name, counted, needs)
    )
    candidates = _candidates(filtered.offers, offers, graph, needs, work, counted)
    hunt = Hunt(graph, needs, work, counted, keep, began + seconds, seconds, today)
    notes: list[str] = []
    here = _here(graph, needs, work, counted, local, notes)
    feasible = [c for c in candidates if hunt.can_meet(c)]
    unsearched = hunt.run(feasible)
    answers = hunt.good()
    if not answers and here is None:
        answers = nearest_or_longer(hunt, candidates, notes)
    if here is not None:
        answers = [here, *answers]
    trained = sum(spec.numel for spec in graph.parameters if spec.trainable)
    if trained < graph.numel:
        notes.append(
            f"{format_count(trained)} of {format_count(graph.numel)} parameters are trained; the others have neither gradients "
            "nor optimizer state"
        )
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


def _candidates(
    offers: Sequence[Offer], everything: Sequence[Offer], graph: Graph, needs: Needs, work: Work, counted: Counted
) -> list[Candidate]:
    """Every shape with the hours and dollars that no plan beats."""
    calibration = load_calibration()
    samples = work.tokens / graph.tokens_per_sample
    least: dict[str, int] = {}
    each: dict[str, tuple[Precision, str, float]] = {}
    parts: dict[str, Accelerator] = {}
    for name in dict.fromkeys(offer.accelerator for offer in offers):
        part = load_accelerators()[name]
        precision, why = training_precision(part, needs.precision, runnable=needs.runnable)
        if precision is None:
            continue  # filters have left it out already
        part = parts[name] = at_tf32(part) if needs.precision == "tf32" else part
        least[name] = least_devices(counted, part.device, precision, calibration)
        each[name] = precision, why, seconds_per_sample(counted, part.device, precision, calibration)
    found = []
    enough = min(1.0, needs.deadline or 1.0)
    alone = {name: samples * seconds / 3600 for name, (_, _, seconds) in each.items()}
    for shape in shapes_of(offers, parts, least, alone, work.batch, everything, enough, _joins(needs)):
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
        found.append(Candidate(shape, precision, why, hours, hours * hourly[0], delay))
    return found


def _joins(needs: Needs) -> Callable[[Offer], bool]:
    """Which offers may be joined: with `--require encrypted-network` those whose network is known to be encrypted."""
    return is_encrypted_between if "encrypted-network" in needs.require else lambda _: True


def _here(
    graph: Graph, needs: Needs, work: Work, counted: Counted, local: Cluster | None, notes: list[str]
) -> Answer | None:
    """This computer, where the model fits and is done soon; a note where that is not known."""
    if needs.only or needs.clouds or needs.require or needs.precision not in ("", "fp32"):
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
        found = search(
            graph, local, batch=work.batch, top=1, space=few_plans(graph, local.devices, runnable=True, experts=False)
        ).estimate
    except (HardwareError, PlanError) as problem:
        notes.append(f"this computer: {problem.message.splitlines()[0]}")
        return None
    answer = local_answer(found, graph, work)
    if answer.hours > limit:
        notes.append(f"this computer's CPU would need about {answer.hours:,.0f} hours")
        return None
    return answer


def _front(hunt: Hunt, answers: Sequence[Answer]) -> tuple[Answer, ...]:
    """Answers that no other one beats in time and money, fastest first."""
    front: list[Answer] = []
    for answer in sorted(answers, key=lambda a: (hunt.hours(a), hunt.usd(a))):
        priced = answer.on_demand or answer.spot
        usd = hunt.usd(answer) if priced else 0.0
        if all(usd < (hunt.usd(other) if other.on_demand or other.spot else 0.0) for other in front):
            front.append(answer)
    return tuple(front)
