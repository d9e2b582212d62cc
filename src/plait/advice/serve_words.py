"""Advice on serving as one paragraph, its warnings, and the trace of each figure."""

from __future__ import annotations

import difflib
from typing import Any

from plait.advice.explain import traced
from plait.advice.serve import ServeAdvice
from plait.advice.serve_answer import ServeAnswer
from plait.errors import RequestError
from plait.hardware.catalogue import load_accelerators
from plait.units import format_count, gib

__all__ = ["SERVE_FIGURES", "explain_serving", "serve_paragraph", "serve_warnings"]

SERVE_FIGURES = (
    "tokens", "hours", "usd", "usd_spot", "throughput", "latency", "first_token", "decode", "memory", "cache", "energy", "co2",
    "price", "peak",
)  # fmt: skip


def _where(answer: ServeAnswer, *, spot: bool) -> str:
    price = answer.price(spot=spot)
    if price is None:
        return answer.accelerator
    return f"{answer.count:g} {answer.accelerator} at {price.offer.cloud} ({answer.instances} x {price.offer.instance_type}, {price.offer.region})"


def serve_paragraph(advice: ServeAdvice) -> str:
    """Plain words for the first answer."""
    first, work, spot = advice.answers[0], advice.work, advice.needs.spot
    found, price = first.estimate, first.price(spot=spot)
    speed = f"{first.throughput:,.0f} {work.unit} per second"
    delay = f"{found.latency * 1e3:,.3g} ms a {work.each}"
    said = []
    if price is None:
        said.append(
            f"Take this computer: its CPU serves {format_count(advice.served.parameters)} parameters at {speed} and {delay}, "
            "nothing needs to be rented"
        )
    else:
        kind = "spot" if spot else "on demand"
        said.append(
            f"Take {_where(first, spot=spot)}: {speed} in {found.plan.precision} with {first.runtime}, {delay}, "
            f"${price.usd_per_hour:,.2f} an hour {kind}, ${price.usd / work.amount * 1e6:,.3g} for a million {work.unit}"
        )
        by = "cheapest" if advice.needs.minimize == "usd" else "quickest"
        why = f"it is the {by} of {advice.looked} ways costed, with {found.plan.batch} at once on each replica"
        if found.load.output_tokens:
            why += f" and a first token after {found.first_token * 1e3:,.0f} ms when nothing waits"
        if first.headroom_gib is not None:
            why += f"; {first.headroom_gib:.1f} GiB of a device stay free"
        said.append(why[0].upper() + why[1:])
        if advice.needs.throughput:
            said.append(
                f"{100 * advice.needs.throughput / first.throughput:.0f} % of it is used at {advice.needs.throughput:g} a second"
            )
    second = next((a for a in advice.answers[1:] if a.accelerator != first.accelerator), None)
    if second is not None and (other := second.price(spot=spot)) is not None:
        said.append(f"Second: {_where(second, spot=spot)}, ${other.usd / work.amount * 1e6:,.3g} for a million")
        if price is not None and price.usd < other.usd and advice.needs.minimize == "usd":
            less = 100 * (1 - price.usd / other.usd)
            said.append(
                f"It would be first if its price fell by {less:.0f} %"
                + (" (about the estimate's own error)" if less < 10 else "")
            )
    quick = advice.front[0] if advice.front else None
    if price is not None and quick is not None and quick.estimate.latency < 0.8 * found.latency:
        paid = quick.price(spot=spot)
        if paid is not None:
            said.append(
                f"Quicker: {_where(quick, spot=spot)} with {quick.estimate.latency * 1e3:,.3g} ms a {work.each} "
                f"for ${paid.usd / work.amount * 1e6:,.3g} a million"
            )
    if advice.needs.precision == "" and price is not None:
        said.append(
            "Nothing is quantised; --precision fp8 or int8 asks for parts and runtimes that take it, and changes what the model answers"
        )
    if price is not None and price.warning:
        said.append(price.warning[0].upper() + price.warning[1:])
    return ". ".join(said) + "."


def serve_warnings(advice: ServeAdvice) -> list[str]:
    """What a reader must know beside it."""
    lines = list(advice.notes)
    stale = [p for a in advice.answers if (p := a.price(spot=advice.needs.spot)) is not None and p.warning]
    if stale:
        lines.append(f"{len(stale)} of {len(advice.answers)} prices are older than 90 days or have no date")
    if advice.answers[0].on_demand is not None and not advice.needs.throughput:
        lines.append(
            "dollars are for an engine that is always full; with --throughput they are for the rate that is asked for"
        )
    if advice.unpriced:
        lines.append(f"{len(advice.unpriced)} parts have no price here, so they could not be ranked: " + ", ".join(advice.unpriced[:6])
                     + (", ..." if len(advice.unpriced) > 6 else ""))  # fmt: skip
    if any(a.estimate.plan.pp > 1 for a in advice.answers):
        lines.append("several instances are taken to be joined by the network that the catalogue states for their part")
    lines.append("queueing, tokenising, traffic, disk and people are not counted")
    return lines


def explain_serving(advice: ServeAdvice, name: str) -> dict[str, Any]:
    """`value`, `unit`, `formula`, `inputs` (each with its source) of the figure called `name`.

    Raises:
        RequestError: there is no such figure, or the first answer has none.
    """
    word = name.strip().lower().replace("-", "_")
    if word not in SERVE_FIGURES:
        near = difflib.get_close_matches(word, SERVE_FIGURES, n=3, cutoff=0.4)
        raise RequestError(
            f"--explain {name!r} is not a figure of the answer",
            hint=(f"nearest: {', '.join(near)}; " if near else "") + f"figures: {', '.join(SERVE_FIGURES)}",
        )
    tell = {
        "tokens": _of_work, "hours": _of_work, "energy": _of_work, "co2": _of_work,
        "memory": _of_memory, "cache": _of_memory, "peak": _of_memory,
        "price": _of_money, "usd": _of_money, "usd_spot": _of_money,
    }.get(word, _of_speed)  # fmt: skip
    return tell(advice, word)


_MODEL = "serving cost model (cost/serving.py, docs/advise.md)"
_COUNTED = "counted over the model's operators (cost/serving_work.py)"


def _hours(advice: ServeAdvice) -> list[tuple[str, Any, str]]:
    work, wanted = advice.work, advice.needs.throughput
    return [
        ("amount", work.amount, work.amount_why),
        (
            "rate",
            wanted or advice.answers[0].throughput,
            "as given by --throughput" if wanted else "--explain throughput",
        ),
    ]


def _of_work(advice: ServeAdvice, word: str) -> dict[str, Any]:
    """tokens, hours, energy, co2."""
    first, work = advice.answers[0], advice.work
    if word == "tokens":
        return traced(word, work.amount, work.unit, "stated", [(word, work.amount, work.amount_why)])
    if word == "hours":
        return traced(word, first.hours, "h", "amount / rate / 3600", _hours(advice))
    value = first.energy_kwh if word == "energy" else first.co2_kg
    if value is None:
        hint = "give --grid KG_PER_KWH" if word == "co2" else "no source states the part's power"
        raise RequestError(f"--explain {word}: the first answer has no such figure", hint=hint)
    if word == "co2":
        grid = ("grid_kg_per_kwh", advice.needs.grid_kg_per_kwh, "as given by --grid")
        return traced(
            word, value, "kg", "energy x grid factor", [("energy_kwh", first.energy_kwh, "--explain energy"), grid]
        )
    formula = "power_w x accelerators x hours / 1000, at maximum power; hosts and cooling add 30 to 60 %"
    inputs = [("accelerators", first.count, "the fleet"), ("hours", first.hours, "--explain hours")]
    part = load_accelerators().get(first.accelerator)
    if part is not None:
        inputs.append(("power_w", part.device.power_w or 0.0, part.device.source))
    return traced(word, value, "kWh", formula, inputs)


def _of_speed(advice: ServeAdvice, word: str) -> dict[str, Any]:
    """throughput, latency, first_token, decode."""
    first, work = advice.answers[0], advice.work
    found, plan, load = first.estimate, first.estimate.plan, advice.work.load
    if word == "throughput":
        pieces = [("batch", plan.batch, "chosen: the cheapest that keeps the latency"), ("replicas", plan.replicas, "of a unit"),
                  ("units", first.units, "as many as --throughput needs")]  # fmt: skip
        if load.output_tokens:
            last = [("latency_s", found.latency, "--explain latency")]
            return traced(
                word, first.throughput, f"{work.unit}/s", "batch x replicas x units / latency", [*pieces, *last]
            )
        return traced(word, first.throughput, "samples/s", "batch x replicas x units / (seconds of a batch / pp)", [
            *pieces, ("batch_s", found.decode, _MODEL), ("pp", plan.pp, "the plan")])  # fmt: skip
    if word == "latency" and load.output_tokens:
        return traced(word, found.latency * 1e3, "ms", "decode + prefills of the whole batch / output tokens", [
            ("decode_ms", found.decode * 1e3, "--explain decode"),
            ("prefills_ms", (found.latency - found.decode) * load.output_tokens * 1e3, _MODEL),
            ("output_tokens", load.output_tokens, work.load_why),
        ])  # fmt: skip
    if word == "first_token" and load.output_tokens:
        pass_ = (
            "the encoder's pass over one prompt and a decoder's"
            if advice.served.encoder
            else "one prefill of one prompt"
        )
        length = f"{_MODEL}; {load.input_tokens:,} tokens: {work.load_why}"
        return traced(word, found.first_token * 1e3, "ms", f"sum of the parts of {pass_}", [
            (name, value * 1e3, length) for name, value in found.first_parts.items()])  # fmt: skip
    inputs = [(name, value * 1e3, _MODEL) for name, value in found.parts.items()]
    return traced(word, found.decode * 1e3, "ms", "sum of the parts of one pass", inputs)


def _of_memory(advice: ServeAdvice, word: str) -> dict[str, Any]:
    """memory, cache, peak."""
    first, load = advice.answers[0], advice.work.load
    found, plan = first.estimate, first.estimate.plan
    if word == "memory":
        inputs = [(name, gib(value), _MODEL) for name, value in found.memory.to_dict().items()]
        return traced(word, gib(found.memory.total), "GiB", "sum of the parts on one device", inputs)
    if word == "cache":
        served = advice.served
        formula = "length x cached_elements"
        length: list[tuple[str, Any, str]] = [("length", load.length, advice.work.load_why)]
        if served.encoder is not None:
            formula = "(output_tokens x cached_elements + input_tokens x cross_cached_elements)"
            length = [(n, getattr(load, n), advice.work.load_why) for n in ("output_tokens", "input_tokens")]
            length.append(("cross_cached_elements", served.cross_cached, _COUNTED))
        return traced(word, gib(found.memory.cache), "GiB", f"batch x {formula} x bytes / min(tp, cache_heads) / pp / 2^30", [
            ("batch", plan.batch, "chosen"), *length, ("cached_elements", served.cached, _COUNTED),
            ("bytes", plan.cache_bytes, "precision of the cache"),
            ("tp", plan.tp, "the plan"), ("cache_heads", served.cache_heads, _COUNTED), ("pp", plan.pp, "the plan"),
        ])  # fmt: skip
    part = load_accelerators().get(first.accelerator)
    if part is None:
        raise RequestError(
            "--explain peak: the first answer is this computer, which was measured", hint="--json shows all it has"
        )
    value = part.device.peak(plan.precision)
    return traced(word, value, "FLOP/s", f"dense {plan.precision} peak", [(part.name, value, part.device.source)])


def _of_money(advice: ServeAdvice, word: str) -> dict[str, Any]:
    """price, usd, usd_spot."""
    first = advice.answers[0]
    price = first.price(spot=word == "usd_spot" or (word == "price" and advice.needs.spot))
    if price is None:
        raise RequestError(f"--explain {word}: the first answer has no such figure", hint="--json shows all it has")
    offer = price.offer
    source = f"{first.instances} x {offer.cloud} {offer.instance_type} {offer.region}, {offer.as_of}, {offer.source}"
    hourly = ("usd_per_hour", price.usd_per_hour, source)
    if word == "price":
        return traced(word, price.usd_per_hour, "USD/h", "price of an instance x instances", [hourly])
    hours = ("hours", price.hours, "--explain hours" + ("; interruptions included" if word == "usd_spot" else ""))
    return traced(word, price.usd, "USD", "hours x usd_per_hour", [*_hours(advice), hours, hourly])
