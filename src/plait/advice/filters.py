"""Which offers remain under the stated needs; each one left out has its reason, and a clash has its names."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from plait.advice.bound import Counted
from plait.advice.compatibility import can_be_costed, training_precision
from plait.advice.needs import Needs
from plait.advice.regions import AREAS
from plait.advice.retired import refuse_retired
from plait.advice.security import meets
from plait.errors import RequestError
from plait.hardware.catalogue import load_accelerators
from plait.hardware.offers import Offer
from plait.schema.records import Record

__all__ = ["Exclusion", "Filtered", "cannot_train", "parts_unpriced", "remaining"]

Check = Callable[[Offer], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion(Record):
    """Offers that were left out for one reason."""

    need: str
    """The option that leaves them out, or what the part lacks."""
    reason: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Filtered:
    """What is left, and what is not."""

    offers: tuple[Offer, ...]
    excluded: tuple[Exclusion, ...]


def remaining(
    offers: Sequence[Offer],
    needs: Needs,
    refusal: Callable[[str], str],
    asked: Callable[[str], str] = lambda _: "",
) -> Filtered:
    """The offers that can be among the answers.

    `refusal` says why a part cannot, '' where it can; `asked` the same of the precision that was asked for.

    Raises:
        RequestError: a cloud is not known, or no offer meets all needs; the message says which needs clash.
    """
    _check_clouds(offers, needs)
    _check_areas(offers, needs)
    unable = {name: refusal(name) for name in {offer.accelerator for offer in offers}}
    wanted, unwanted = needs.wanted(), needs.unwanted()
    checks: dict[str, Check] = {
        "part": lambda o: unable[o.accelerator],
    }
    if needs.task != "serve":
        checks["offer"] = lambda o: "Inference Endpoints serve models, they do not train" if _is_endpoint(o) else ""
        checks["slice"] = lambda o: "" if o.count >= 1 else "a slice of an accelerator cannot be joined to others"
    if needs.precision:
        in_precision = {name: asked(name) for name in unable}
        checks[f"--precision {needs.precision}"] = lambda o: in_precision[o.accelerator]
    if needs.clouds:
        clouds = {cloud.lower() for cloud in needs.clouds}
        checks["--clouds"] = lambda o: "" if o.cloud in clouds else "not one of the clouds asked for"
    if needs.only:
        checks["--only"] = lambda o: "" if o.accelerator in wanted else "not one of the parts asked for"
    if needs.avoid:
        checks["--avoid"] = lambda o: "to be avoided" if o.accelerator in unwanted else ""
    for need in needs.require:
        checks[f"--require {need}"] = _required(need)
    wholly = "the spot price" if needs.spot else "the on-demand price"
    checks["--spot" if needs.spot else "unpriced"] = lambda o: (
        "" if (o.spot_usd_per_hour if needs.spot else o.usd_per_hour) else f"{wholly} is not known"
    )
    kept: list[Offer] = []
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for offer in offers:
        why = next(((need, reason) for need, check in checks.items() if (reason := check(offer))), None)
        if why is None:
            kept.append(offer)
            continue
        counts[why] += 1
        examples.setdefault(why, f"{offer.cloud} {offer.instance_type} ({offer.accelerator}, {offer.region})")
    excluded = tuple(
        Exclusion(need=need, reason=reason, count=count, example=examples[need, reason])
        for (need, reason), count in counts.most_common()
    )
    if not kept:
        raise _clash(offers, checks, _of_parts(needs, offers, lambda name: refusal(name) or asked(name)), needs.task)
    return Filtered(tuple(kept), excluded)


def parts_unpriced(needs: Needs, offers: Sequence[Offer]) -> tuple[str, ...]:
    """Parts that do the task and that nobody here has a price for."""
    priced = {o.accelerator for o in offers if (o.spot_usd_per_hour if needs.spot else o.usd_per_hour)}
    names = needs.wanted() - needs.unwanted() - priced
    able = [n for n, part in load_accelerators().items() if part.device.trains or needs.task == "serve"]
    return tuple(n for n in able if n in names)


def _is_endpoint(offer: Offer) -> bool:
    return offer.cloud == "huggingface" and offer.instance_type.startswith("endpoints-")


def cannot_train(name: str, counted: Counted, needs: Needs) -> str:
    """Why the part called `name` cannot train the model; '' where it can."""
    part = load_accelerators()[name]
    precision, why = training_precision(part, needs.precision, runnable=needs.runnable)
    return why if precision is None else can_be_costed(part, counted, precision)


def _required(need: str) -> Check:
    parts = load_accelerators()

    def check(offer: Offer) -> str:
        fine, reason = meets(need, parts[offer.accelerator], offer)
        return "" if fine else reason

    return check


def _check_clouds(offers: Sequence[Offer], needs: Needs) -> None:
    known = sorted({offer.cloud for offer in offers})
    for cloud in needs.clouds:
        if cloud.lower() not in known:
            refuse_retired(cloud)
            near = difflib.get_close_matches(cloud.lower(), known, n=3, cutoff=0.4)
            raise RequestError(
                f"--clouds {cloud!r} is not a cloud with offers here",
                hint=(f"nearest: {', '.join(near)}; " if near else "") + f"all: {', '.join(known)}",
            )


def _check_areas(offers: Sequence[Offer], needs: Needs) -> None:
    regions = {offer.region.lower() for offer in offers}
    for need in needs.require:
        name, sign, area = need.partition("=")
        known = {*AREAS, *(regions if name == "region" else ())}
        if sign and area.lower() not in known and not re.fullmatch("[A-Za-z]{2}", area):
            near = difflib.get_close_matches(area.lower(), sorted(known), n=3, cutoff=0.5)
            own = ", or a region's own name" if name == "region" else ""
            raise RequestError(
                f"--require {need}: {area!r} is no {name} that any offer states",
                hint=(f"nearest: {', '.join(near)}; " if near else "")
                + f"known: {', '.join(AREAS)}, a country's code of two letters{own}",
            )


def _of_parts(needs: Needs, offers: Sequence[Offer], refusal: Callable[[str], str]) -> str:
    """What keeps the parts asked for from being answers, in words; '' where nothing was asked for or they could be."""
    if not needs.only:
        return ""
    unpriced = set(parts_unpriced(needs, offers))
    reasons = []
    for name in sorted(needs.wanted() - needs.unwanted()):
        if why := refusal(name):
            reasons.append(why)
        elif name in unpriced:
            reasons.append(f"{name} has no {'spot' if needs.spot else 'on-demand'} price here")
    return "; ".join(reasons[:3])


def _clash(offers: Sequence[Offer], checks: Mapping[str, Check], parts: str, task: str) -> RequestError:
    """The error when nothing is left: the smallest set of needs without which something is."""
    stated = [need for need in checks if need.startswith("--")]
    for size in (1, 2, 3):
        hints: dict[tuple[str, ...], str] = {}
        for dropped in itertools.combinations(stated, size):
            left = [o for o in offers if not any(check(o) for need, check in checks.items() if need not in dropped)]
            if left:
                names = sorted({o.accelerator for o in left})
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                hints[dropped] = f"without {' and '.join(dropped)}: {len(left)} offers ({shown})"
        if not hints:
            continue
        named = list(dict.fromkeys(need for dropped in hints for need in dropped))
        others = [need for need in stated if need not in named]
        if len(stated) == 1:
            message = f"no offer meets {named[0]}"
        elif len(named) == 1:
            message = f"no offer meets all needs: {named[0]} clashes with {' and '.join(others)}"
        else:
            message = f"no offer meets all needs: {' and '.join(named)} clash"
        if parts and "--only" in named:
            message += f": {parts}"
        return RequestError(message, hint="; ".join(list(hints.values())[:4]))
    return RequestError(
        f"no offer that can {'serve' if task == 'serve' else 'train'} this model has a price"
        + (f": {parts}" if parts else ""),
        hint="`plait hardware list` prints the parts and their offers; drop --spot, --only or --require",
    )
