"""The ranked answers for serving.

    offers -> filters -> ways (part, instances, tp x pp, replicas, batch) -> those that keep the latency -> fleet -> ranking

Nothing is bounded or left unsearched: a way is arithmetic (`plait.cost.serving`). Each part is taken at the batch that
makes its tokens cheapest within the latency asked for; a fleet is as many units as the throughput asked for needs.
"""

from __future__ import annotations

import datetime
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plait.advice.answer import Price
from plait.advice.filters import Exclusion, parts_unpriced, remaining
from plait.advice.hunt import varied
from plait.advice.interruptions import expected_hours
from plait.advice.needs import Needs
from plait.advice.prices import age_days, price_warning
from plait.advice.runtimes import Choice, choose_runtime
from plait.advice.security import is_encrypted_between
from plait.advice.serve_answer import ServeAnswer, usd_of
from plait.advice.serve_nearest import misses, nearest
from plait.advice.serve_reasons import reasons_for
from plait.advice.serve_shapes import Way, ways
from plait.advice.serve_work import ServeWork, serve_work_of
from plait.advice.work import as_samples
from plait.cost.serving import ServingPlan, batches, estimate_serving
from plait.cost.serving_work import Served, served_work
from plait.errors import HardwareError, PlanError, RequestError
from plait.hardware.catalogue import load_accelerators
from plait.hardware.offers import Offer, load_offers
from plait.plan.space import facts_of
from plait.schema.cluster import Cluster
from plait.schema.graph import Graph
from plait.units import gib

__all__ = ["ServeAdvice", "advise_serving"]

LOCAL = 24.0
"""Hours up to which this computer is the answer."""
USUAL_LATENCY = 0.1
"""Seconds between tokens that hold where none are asked for: ten tokens a second, faster than people read."""
_AS_GOOD = 1.01
"""Dollars over the least that count as the same: far below what the estimate knows."""
LOCAL_LATENCY = 0.2
"""Seconds between tokens (of a batch) up to which it is, where no latency is asked for: about as fast as one reads."""


@dataclass(frozen=True, slots=True)
class ServeAdvice:
    """What was asked, and the answers."""

    graph: Graph
    needs: Needs
    work: ServeWork
    served: Served
    answers: tuple[ServeAnswer, ...]
    front: tuple[ServeAnswer, ...]
    """No other answer is at once cheaper and quicker from token to token."""
    excluded: tuple[Exclusion, ...]
    unpriced: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    looked: int
    """Ways that were costed."""
    seconds: float
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """The object that `plait advise --json` prints."""
        return {
            "model": self.graph.name,
            "parameters": self.graph.numel,
            "needs": self.needs.to_dict(),
            "work": self.work.to_dict(),
            "decodes": self.served.decodes,
            "answers": [a.summary(self.work) for a in self.answers],
            "pareto": [a.summary(self.work) for a in self.front],
            "excluded": [e.to_dict() for e in self.excluded],
            "unpriced": list(self.unpriced),
            "failed": [{"shape": name, "reason": why} for name, why in self.failed],
            "bounded": self.looked,
            "searched": self.looked,
            "unsearched": 0,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def advise_serving(
    graph: Graph,
    needs: Needs,
    *,
    offers: Sequence[Offer] | None = None,
    local: Cluster | None = None,
    keep: int = 8,
    today: datetime.date | None = None,
) -> ServeAdvice:
    """The `keep` best answers to `needs` for serving `graph`, and the front of latency and money.

    Raises:
        RequestError: needs clash, or nothing keeps latency, budget and deadline; the message has the nearest.
    """
    began = time.perf_counter()
    today = today or datetime.datetime.now(datetime.UTC).date()
    graph = as_samples(graph)
    served = served_work(graph)
    work = serve_work_of(graph, served, needs)
    if not work.load.output_tokens and served.decodes:
        served = replace(served, cached=0.0, cross_cached=0.0)
    decodes = served.decodes and work.load.output_tokens > 0
    offers = load_offers() if offers is None else offers
    kinds = {"attends": served.attention_flops > 0, "crosses": served.encoder is not None and decodes}

    def chosen(precision: str) -> dict[str, tuple[Choice | None, str]]:
        parts = load_accelerators().items()
        return {n: choose_runtime(part, decodes=decodes, precision=precision, **kinds) for n, part in parts}

    at, free = chosen(needs.precision), chosen("")
    # A part that states no rate but the one asked for is refused by neither.
    refused = {name: "" if at[name][0] else free[name][1] for name in at}
    filtered = remaining(offers, needs, lambda name: refused[name] or _unknown(name), lambda name: at[name][1])
    choices: dict[str, Choice] = {name: choice for name, (choice, _) in at.items() if choice is not None}
    failed: list[tuple[str, str]] = []
    heads = facts_of(graph).heads
    joins = is_encrypted_between if "encrypted-network" in needs.require else lambda _: True
    found = list(ways(filtered.offers, offers, served, work.load, choices, heads, failed, joins))
    notes: list[str] = list(work.notes)
    here = _here(served, needs, work, local, notes)
    answers = [a for way in found if (a := _answer(way, needs, work, today)) is not None]
    if needs.spot and found and not answers:
        raise RequestError(
            f"no spot offer serves: {needs.interruptions_per_day:g} interruptions a day of each instance leave no time between "
            f"restarts of {needs.restart_minutes:g} minutes",
            hint="leave out --spot, or lower --interruptions-per-day or --restart-minutes",
        )
    good = [a for a in answers if not misses(a, needs)]
    if decodes and needs.latency_ms is None:
        quick = [a for a in good if a.estimate.latency <= USUAL_LATENCY]
        text = f"without --latency-ms, {USUAL_LATENCY * 1e3:.0f} ms a token hold"
        notes.append(text if quick else text + "; nothing keeps them, so the answers are slower")
        good = quick or good
    if not good and here is None:
        raise nearest(answers, needs, served, failed)
    best = _best_of_each(good, needs)
    ranked = [*([here] if here else []), *varied(best)]
    return ServeAdvice(
        graph=graph,
        needs=needs,
        work=work,
        served=served,
        answers=tuple(ranked[:keep]),
        front=_front([*([here] if here else []), *good], needs),
        excluded=filtered.excluded,
        unpriced=parts_unpriced(needs, offers),
        failed=tuple(failed),
        looked=len(found),
        seconds=time.perf_counter() - began,
        notes=tuple(notes),
    )


def _unknown(name: str) -> str:
    """Why no time can be estimated on a part; '' where it can."""
    device = load_accelerators()[name].device
    try:
        device.need("memory_bandwidth")
        device.need("memory_bytes")
    except HardwareError as problem:
        return problem.message
    return ""


def _answer(way: Way, needs: Needs, work: ServeWork, today: datetime.date) -> ServeAnswer | None:
    """The answer that a way makes; None where it has no price that is ranked by."""
    found = way.estimate
    each = found.throughput
    units = max(1, math.ceil(needs.throughput / each - 1e-9)) if needs.throughput else 1
    total = units * each
    rate = needs.throughput or total
    hours = work.amount / rate / 3600
    # Nothing is lost but the restart; any instance of a replica that spans several stops it.
    on_spot = expected_hours(
        hours,
        instances=way.instances,
        per_day=needs.interruptions_per_day,
        checkpoint_minutes=0.0,
        restart_minutes=needs.restart_minutes,
    )

    def price(*, spot: bool) -> Price | None:
        best = way.hourly(spot=spot)
        if best is None:
            return None
        hourly, offer = best
        billed = on_spot if spot else hours
        return Price(
            offer=offer, usd_per_hour=hourly * units, hours=billed, usd=hourly * units * billed, age_days=age_days(offer, today),
            warning=price_warning(offer, today),
        )  # fmt: skip

    on_demand, spot = price(spot=False), price(spot=True)
    ranked = spot if needs.spot else on_demand
    if ranked is None or math.isinf(ranked.usd):
        return None
    power = way.part.device.power_w
    kwh = None if power is None else power * max(1.0, way.devices) * units * hours / 1000
    return ServeAnswer(
        accelerator=way.part.name,
        count=way.devices * units,
        instances=way.instances * units,
        units=units,
        throughput=total,
        hours=hours,
        on_demand=on_demand,
        spot=spot,
        energy_kwh=kwh,
        co2_kg=None if kwh is None or needs.grid_kg_per_kwh is None else kwh * needs.grid_kg_per_kwh,
        estimate=found,
        runtime=way.choice.runtime,
        headroom_gib=None if found.memory_limit is None else gib(found.memory_limit - found.memory.total),
        reasons=reasons_for(way, found),
    )


def _here(served: Served, needs: Needs, work: ServeWork, local: Cluster | None, notes: list[str]) -> ServeAnswer | None:
    """This computer, where it holds the model, keeps the needs and is done soon; a note where it does not."""
    if needs.only or needs.clouds or needs.require or needs.precision not in ("", "fp32", "bf16"):
        return None
    if local is None:
        if served.parameters < 1e9:
            notes.append(
                "a model this small may not need an accelerator: run `plait hardware probe` once, and this computer is compared"
            )
        return None
    device = local.groups[0].device
    precision = needs.precision or max(("fp32", "bf16"), key=lambda p: device.peak_flops.get(p, 0.0))
    try:
        plan = ServingPlan(precision=precision)
        first = estimate_serving(served, local, plan, work.load)
        sizes = [
            estimate_serving(served, local, replace(plan, batch=b), work.load) for b in batches(first.largest_batch)
        ]
    except (HardwareError, PlanError) as problem:
        notes.append(f"this computer: {problem.message.splitlines()[0]}")
        return None
    limit = (needs.latency_ms or 1e3 * LOCAL_LATENCY) / 1e3
    quick = [
        e
        for e in sizes
        if e.latency <= limit and not (needs.first_token_ms and e.first_token * 1e3 > needs.first_token_ms)
    ]
    if not quick:
        why = "it does not hold the model" if not sizes else f"{sizes[0].latency * 1e3:,.0f} ms a {work.each} at best"
        notes.append(f"this computer's CPU is no answer: {why}")
        return None
    best = max(quick, key=lambda e: e.throughput)
    hours = work.amount / (needs.throughput or best.throughput) / 3600
    if hours > min(LOCAL, needs.deadline or LOCAL) or best.throughput < (needs.throughput or 0.0):
        notes.append(f"this computer's CPU serves {best.throughput:,.1f} {work.unit} per second: too few")
        return None
    return ServeAnswer(
        accelerator="this computer's CPU", count=1, instances=1, units=1, throughput=best.throughput, hours=hours, on_demand=None,
        spot=None, energy_kwh=None, co2_kg=None, estimate=best, runtime="PyTorch",
        headroom_gib=None if best.memory_limit is None else gib(best.memory_limit - best.memory.total),
        reasons=(f"serves in {precision}, {device.source}",),
    )  # fmt: skip


def _key(answer: ServeAnswer, needs: Needs) -> tuple[float, float]:
    usd, latency = usd_of(answer, needs), answer.estimate.latency
    return (usd, latency) if needs.minimize == "usd" else (latency, usd)


def _best_of_each(answers: Iterable[ServeAnswer], needs: Needs) -> list[ServeAnswer]:
    """The best batch and degrees of every part, instance size and precision; ranked.

    Where a smaller batch costs as good as the same (`_AS_GOOD`), it is taken: its replies come sooner.
    """
    groups: dict[tuple[str, float, int], list[ServeAnswer]] = defaultdict(list)
    for answer in answers:
        groups[answer.accelerator, answer.count / answer.units, answer.instances // answer.units].append(answer)
    best = []
    for group in groups.values():
        if needs.minimize == "usd":
            limit = _AS_GOOD * min(usd_of(a, needs) for a in group)
            best.append(
                min(
                    (a for a in group if usd_of(a, needs) <= limit),
                    key=lambda a: (a.estimate.latency, usd_of(a, needs)),
                )
            )
        else:
            best.append(min(group, key=lambda a: _key(a, needs)))
    return sorted(best, key=lambda a: _key(a, needs))


def _front(answers: Sequence[ServeAnswer], needs: Needs) -> tuple[ServeAnswer, ...]:
    """Answers that no other one beats in latency and money, quickest first."""
    front: list[ServeAnswer] = []
    for answer in sorted(answers, key=lambda a: (a.estimate.latency, usd_of(a, needs))):
        if not front or usd_of(answer, needs) < usd_of(front[-1], needs) * (1 - 1e-9):
            front.append(answer)
    return tuple(front)
