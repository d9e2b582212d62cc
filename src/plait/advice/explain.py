"""Where a figure of the first answer comes from: formula, inputs, source of each."""

from __future__ import annotations

import difflib
from typing import Any

from plait.advice.advise import Advice
from plait.advice.answer import Answer
from plait.errors import RequestError
from plait.hardware.catalogue import load_accelerators
from plait.units import gib

__all__ = ["FIGURES", "explain", "traced"]

FIGURES = (
    "tokens",
    "batch",
    "hours",
    "tokens_per_s",
    "step_time",
    "headroom",
    "usd",
    "usd_spot",
    "mfu",
    "memory",
    "energy",
    "co2",
    "price",
    "peak",
)


def explain(advice: Advice, name: str) -> dict[str, Any]:
    """`value`, `unit`, `formula`, `inputs` (each with its source) of the figure called `name`.

    Raises:
        RequestError: there is no such figure, or the first answer has none.
    """
    word = name.strip().lower()
    if word not in FIGURES:
        near = difflib.get_close_matches(word, FIGURES, n=3, cutoff=0.4)
        raise RequestError(
            f"--explain {name!r} is not a figure of the answer",
            hint=(f"nearest: {', '.join(near)}; " if near else "") + f"figures: {', '.join(FIGURES)}",
        )
    first, work = advice.answers[0], advice.work
    found = first.estimate
    if word in ("tokens", "batch"):
        value: float = work.tokens if word == "tokens" else work.batch
        return traced(
            word,
            value,
            work.unit if word == "tokens" else "samples",
            "stated",
            [(word, value, getattr(work, f"{word}_why"))],
        )
    hours = [
        ("tokens", work.tokens, work.tokens_why),
        ("tokens_per_s", found.tokens_per_s, f"cost model, plan {found.plan.spec()} (docs/cost.md)"),
    ]
    if word == "hours":
        return traced(word, first.hours, "h", "tokens / tokens_per_s / 3600", hours)
    if word in ("tokens_per_s", "step_time", "headroom", "memory"):
        return _of_step(advice, word)
    if word == "mfu":
        return traced(
            word, found.mfu, "of peak", "matmul and attention FLOP of a step / (step_time x devices x peak)",
            [
                ("flop_per_sample", advice.counted.flops, "counted over the model's operators"),
                ("step_time_s", found.step_time_s, "cost model (docs/cost.md)"),
                ("batch", work.batch, work.batch_why),
                ("devices", found.plan.devices, "the plan"),
                *_peak(first),
            ],
        )  # fmt: skip
    if word == "energy":
        value = _need(word, first.energy_kwh)
        return traced(word, value, "kWh", "joule_per_step x steps / 3.6e6; accelerators alone, hosts and cooling add 30 to 60 %", [
            ("joule_per_step", found.joule_per_step, "board power x time (cost/money.py)"),
            ("steps", work.tokens / (work.batch * advice.graph.tokens_per_sample), "tokens / (batch x tokens of a sample)"),
        ])  # fmt: skip
    if word == "co2":
        value = _need(word, first.co2_kg)
        return traced(word, value, "kg", "energy x grid factor", [
            ("energy_kwh", first.energy_kwh, "--explain energy"),
            ("grid_kg_per_kwh", advice.needs.grid_kg_per_kwh, "as given by --grid"),
        ])  # fmt: skip
    if word == "peak":
        part = load_accelerators().get(first.accelerator)
        told = first.compatibility
        if part is None or told is None:
            raise RequestError("--explain peak: the first answer is this computer, which was measured")
        return traced(word, part.device.peak(told.precision), "FLOP/s", f"dense {told.precision} peak", [
            (part.name, part.device.peak(told.precision), part.device.source)
        ])  # fmt: skip
    price = first.price(spot=word == "usd_spot" or (word == "price" and advice.needs.spot))
    if price is None:
        raise RequestError(f"--explain {word}: the first answer has no such figure", hint="--json shows all it has")
    rate = ("usd_per_hour", price.usd_per_hour,
            f"{first.instances} x {price.offer.cloud} {price.offer.instance_type} {price.offer.region}, {price.offer.as_of}, {price.offer.source}")  # fmt: skip
    if word == "price":
        return traced(word, price.usd_per_hour, "USD/h", "price of an instance x instances", [rate])
    if word == "usd":
        return traced(word, price.usd, "USD", "hours x usd_per_hour", [*hours, rate])
    needs = advice.needs
    return traced(word, price.usd, "USD", "hours / (1 - instances x per_day/24 x (checkpoint/2 + restart)/60) x usd_per_hour", [
        *hours, rate, ("instances", first.instances, "the shape"),
        ("per_day", needs.interruptions_per_day, "assumed, no source; --interruptions-per-day"),
        ("checkpoint_minutes", needs.checkpoint_minutes, "--checkpoint-minutes"),
        ("restart_minutes", needs.restart_minutes, "assumed, no source; --restart-minutes"),
    ])  # fmt: skip


def _peak(first: Answer) -> list[tuple[str, Any, str]]:
    """The rate that use is counted against; nothing for this computer, whose rates were measured."""
    part, told = load_accelerators().get(first.accelerator), first.compatibility
    if part is None or told is None:
        return []
    return [("peak", part.device.peak(told.precision), part.device.source)]


def _of_step(advice: Advice, word: str) -> dict[str, Any]:
    """tokens_per_s, step_time, memory, headroom."""
    found, work = advice.answers[0].estimate, advice.work
    if word == "memory":
        parts = found.memory[found.fullest].to_dict()
        return traced(
            word, gib(found.peak_memory), "GiB", "sum of the parts on the fullest rank",
            [(part, gib(value), "cost model, cost/memory.py") for part, value in parts.items()],
        )  # fmt: skip
    if word == "tokens_per_s":
        length = advice.graph.tokens_per_sample
        return traced(word, found.tokens_per_s, f"{work.unit}/s", "batch x tokens of a sample / step_time", [
            ("batch", work.batch, work.batch_why), ("tokens_of_a_sample", length, "the job's own sample"),
            ("step_time_s", found.step_time_s, "--explain step_time"),
        ])  # fmt: skip
    if word == "step_time":
        parts = {k: v for k, v in found.breakdown.to_dict().items() if k != "communication_hidden"}
        return traced(word, found.step_time_s, "s", "sum of the parts on the rank that works longest", [
            (k, v, "cost model (docs/cost.md)") for k, v in parts.items()
        ])  # fmt: skip
    limit = _need(word, found.memory_limit)
    return traced(word, gib(limit - found.peak_memory), "GiB", "what a device may use - the fullest rank's memory", [
        ("memory_limit_gib", gib(limit), "94 % of the device's memory: drivers and the allocator hold the rest"),
        ("memory_gib", gib(found.peak_memory), "--explain memory"),
    ])  # fmt: skip


def _need(name: str, value: float | None) -> float:
    if value is None:
        hint = {"co2": "give --grid KG_PER_KWH", "energy": "no source states the part's power"}.get(
            name, "--json shows all it has"
        )
        raise RequestError(f"--explain {name}: the first answer has no such figure", hint=hint)
    return value


def traced(name: str, value: float, unit: str, formula: str, inputs: list[tuple[str, Any, str]]) -> dict[str, Any]:
    """The trace of one figure; inputs are (name, value, source)."""
    return {
        "figure": name,
        "value": value,
        "unit": unit,
        "formula": formula,
        "inputs": [{"name": n, "value": v, "source": s} for n, v, s in inputs],
    }
