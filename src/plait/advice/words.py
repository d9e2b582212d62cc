"""The advice as one paragraph: what to take, why, what second, what would change the answer."""

from __future__ import annotations

from plait.advice.advise import Advice
from plait.advice.answer import Answer, Price, length
from plait.units import format_count

__all__ = ["paragraph", "warnings"]


def _from(answer: Answer, price: Price) -> str:
    return f"{answer.count} {answer.accelerator} at {price.offer.cloud} ({answer.instances} x {price.offer.instance_type}, {price.offer.region})"


def paragraph(advice: Advice) -> str:
    """Plain words for the first answer."""
    first, spot = advice.answers[0], advice.needs.spot
    task = f"{format_count(advice.work.tokens)} {advice.work.unit}"
    size = f"{format_count(advice.graph.numel)} parameters"
    price = first.price(spot=spot)
    said = []
    if price is None:
        said.append(
            f"Take this computer: {size} and {task} take about {length(first.hours)} on its CPU, nothing needs to be rented"
        )
    else:
        kind = "spot" if spot else "on demand"
        said.append(
            f"Take {_from(first, price)}: {size} and {task} take {length(price.hours)} and ${price.usd:,.2f} {kind}"
        )
        by = "cheapest" if advice.needs.minimize == "usd" else "fastest"
        why = f"it is the {by} of {advice.searched} shapes searched, at {100 * first.estimate.mfu:.0f} % of peak"
        if first.headroom_gib is not None:
            why += f" with {first.headroom_gib:.1f} GiB to spare on the fullest device"
        said.append(why[0].upper() + why[1:])
        if first.count != first.estimate.plan.devices:
            said.append(f"Its plan uses {first.estimate.plan.devices} of the {first.count}")
        if first.not_executable:
            said.append(
                f"Plait's own runtime does not execute this plan ({'; '.join(first.not_executable)}): --runnable leaves such "
                "plans out"
            )
        if not spot and first.spot is not None and first.spot.usd < price.usd:
            said.append(
                f"On spot machines it would be ${first.spot.usd:,.2f} and {length(first.spot.hours)}, "
                f"if an instance is taken away {advice.needs.interruptions_per_day:g} times a day"
            )
    other = next((a for a in advice.answers[1:] if a.accelerator != first.accelerator), None)
    second = other or next(iter(advice.answers[1:]), None)
    if second is not None and (next_price := second.price(spot=spot)) is not None:
        said.append(f"Second: {_from(second, next_price)}, {length(next_price.hours)} and ${next_price.usd:,.2f}")
        if price is not None and price.usd > 0 and advice.needs.minimize == "usd":
            less = 100 * (1 - price.usd / next_price.usd)
            if less > 0:
                said.append(
                    f"It would be first if its price fell by {less:.0f} %"
                    + (" (less than the estimate's own error of 5 to 30 %)" if less < 10 else "")
                )
    if price is not None:
        faster = [a for a in advice.front if a.hours < first.hours]
        if faster and (paid := faster[-1].price(spot=spot)) is not None:
            said.append(f"To be done sooner: {faster[-1].name} in {length(paid.hours)} for ${paid.usd:,.2f}")
        if price.warning:
            said.append(price.warning[0].upper() + price.warning[1:])
    return ". ".join(said) + "."


def warnings(advice: Advice) -> list[str]:
    """What a reader must know of prices, parts without one, and what was not looked at."""
    lines = list(advice.notes)
    stale = [p for a in advice.answers if (p := a.price(spot=advice.needs.spot)) is not None and p.warning]
    if stale:
        lines.append(f"{len(stale)} of {len(advice.answers)} prices are older than 90 days or have no date")
    if advice.answers[0].hours < 1 and advice.answers[0].on_demand is not None:
        lines.append(
            "starting a machine takes minutes, and clouds bill a minute to an hour at least: so short a run costs more"
        )
    if advice.unpriced:
        lines.append(
            f"{len(advice.unpriced)} parts that train have no price here, so they could not be ranked: "
            + ", ".join(advice.unpriced[:6])
            + (", ..." if len(advice.unpriced) > 6 else "")
        )
    if any(a.instances > 1 for a in advice.answers):
        lines.append(
            "several instances are taken to be joined by the network that the catalogue states for their part: "
            "ask whether the cloud sells them so"
        )
    if advice.unsearched:
        lines.append(f"{advice.unsearched} shapes could still matter when the time for searching was over")
    lines.append("disk, network traffic, software, failures of on-demand machines and people are not counted")
    return lines
