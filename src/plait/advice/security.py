"""Stated security needs against what the tables say of part, offer and provider. Unknown is never yes.

`data/security.csv` has, by cloud and beginning of an instance type's name, whether the offer runs confidentially, whether
what travels between its instances is encrypted, and whether its host is one customer's: `yes`, `on-request` (an option that
costs what the row says and that the customer has to set) or `no`; the longest beginning counts. `data/providers.csv` has
who the provider is and whose law it is under.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from plait.advice.regions import AREAS, lies_in
from plait.errors import HardwareError
from plait.hardware.catalogue import Accelerator
from plait.hardware.offers import Offer
from plait.hardware.tables import choice, rows
from plait.schema.records import Record

__all__ = ["NEEDS", "Fact", "Provider", "fact", "is_encrypted_between", "meets", "provider", "security_notes"]

_DATA = Path(__file__).parent / "data"
NEEDS = {
    "confidential": "accelerator and host run in a memory-encrypting TEE, and the offer switches it on (or lets you)",
    "encrypted-network": "what travels between instances is encrypted below the job, or one instance does it all",
    "single-tenant": "the whole host is one customer's",
    "whole-accelerator": "no slice of a shared accelerator",
    "no-marketplace": "not a marketplace of unknown hosts, nor a broker of other people's machines",
    "region=": "where the machines stand: eu, eea, us, uk, a country's code or a region's own name",
    "jurisdiction=": "whose law the provider is under: eu, eea, us, uk or a country's code",
}
# One core of kernel WireGuard; several tunnels use several cores.
WIREGUARD = "WireGuard between them reaches 1.5 to 8 Gb/s a tunnel (netgate.com/blog/wireguard-in-pfsense-2-5-performance; 7.9 Gb/s on a 10 Gb/s network in a 2024 comparison), a fiftieth of what such nodes have, and RDMA cannot use it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact(Record):
    """What the table says of one property of an offer."""

    answer: str
    """yes, on-request, no or unknown."""
    detail: str
    cost: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider(Record):
    """Who bills."""

    kind: str
    """cloud, marketplace or broker."""
    jurisdiction: str
    source: str


@functools.cache
def _facts() -> tuple[tuple[str, str, str, Fact], ...]:
    found = []
    for where, c in rows(_DATA / "security.csv", ("cloud", "starts", "property", "answer", "detail", "cost", "source")):
        answer = choice(where, c, "answer", ("yes", "on-request", "no"))
        named = choice(where, c, "property", ("confidential", "encrypted-network", "single-tenant"))
        if not c["source"]:
            raise HardwareError(f"{where}: a source is needed")
        found.append(
            (
                c["cloud"],
                c["starts"],
                named,
                Fact(answer=answer, detail=c["detail"], cost=c["cost"], source=c["source"]),
            )
        )
    return tuple(sorted(found, key=lambda row: -len(row[1])))


@functools.cache
def _providers() -> dict[str, Provider]:
    return {
        c["cloud"]: Provider(
            kind=choice(where, c, "kind", ("cloud", "marketplace", "broker")),
            jurisdiction=c["jurisdiction"],
            source=c["source"],
        )
        for where, c in rows(_DATA / "providers.csv", ("cloud", "kind", "jurisdiction", "source"))
    }


def provider(cloud: str) -> Provider | None:
    """Who the provider is; None where nobody says."""
    return _providers().get(cloud)


def fact(name: str, offer: Offer) -> Fact:
    """What is known of the property called `name` of an offer; `unknown` where no row says."""
    for cloud, starts, named, found in _facts():
        if named == name and cloud == offer.cloud and offer.instance_type.startswith(starts):
            return found
    return Fact(
        answer="unknown", detail=f"no source says it of {offer.cloud} {offer.instance_type}", cost="", source=""
    )


def is_encrypted_between(offer: Offer) -> bool:
    """Whether what several instances send one another is known to be encrypted (or can be switched so)."""
    return fact("encrypted-network", offer).answer in ("yes", "on-request")


def meets(need: str, part: Accelerator, offer: Offer) -> tuple[bool, str]:
    """Whether the tables say that the offer meets `need`, and the reason in words."""
    if need.startswith("region="):
        return lies_in(offer, need.removeprefix("region="))
    if need.startswith("jurisdiction="):
        return _under(offer, need.removeprefix("jurisdiction="))
    if need == "confidential":
        if part.confidential_computing != "yes":
            return False, f"confidential computing of {part.name}: {part.confidential_computing}"
        return _stated("confidential", offer, "is not known to switch it on")
    if need == "single-tenant":
        return _stated("single-tenant", offer, "other tenants of the host are not ruled out")
    if need == "encrypted-network":
        found = fact(need, offer)
        # An instance by itself sends nothing to others; the shapes that join several are left out (`is_encrypted_between`).
        return True, found.detail if found.answer in ("yes", "on-request") else "one instance alone: nothing leaves it"
    if need == "whole-accelerator":
        whole = offer.count >= 1
        return whole, "whole" if whole else f"{offer.instance_type} is {offer.count:g} of an accelerator"
    seller = provider(offer.cloud)
    if seller is None:
        return False, f"nobody says whose machines {offer.cloud} rents out"
    fine = seller.kind == "cloud"
    return fine, "the cloud's own machines" if fine else f"{offer.cloud} is a {seller.kind}"


def _stated(name: str, offer: Offer, otherwise: str) -> tuple[bool, str]:
    found = fact(name, offer)
    if found.answer in ("yes", "on-request"):
        return True, found.detail
    return False, f"{offer.cloud} {offer.instance_type}: {otherwise} ({found.answer}: {found.detail})"


def _under(offer: Offer, area: str) -> tuple[bool, str]:
    """Whether the provider is known to be under the law of `area`."""
    seller = provider(offer.cloud)
    if seller is None or not seller.jurisdiction:
        return False, f"the jurisdiction of {offer.cloud} is not known"
    inside = seller.jurisdiction in AREAS.get(area.lower(), frozenset([area.upper()]))
    return inside, f"{offer.cloud} is under the law of {seller.jurisdiction} ({seller.source})"


def security_notes(part: Accelerator, offer: Offer, instances: int) -> list[str]:
    """What is known of an answer's security, with what has to be switched on and what it costs; each with its source."""
    lines = []
    for name in ("confidential", "encrypted-network", "single-tenant"):
        if name == "encrypted-network" and instances == 1:
            continue
        found = fact(name, offer)
        cost = f"; cost: {found.cost}" if found.cost else ""
        lines.append(f"{name}: {found.answer}: {found.detail}{cost}" + (f" ({found.source})" if found.source else ""))
        if name == "encrypted-network" and found.answer in ("no", "unknown"):
            lines.append(WIREGUARD)
    if part.confidential_computing == "yes" and part.vendor == "NVIDIA" and offer.count > 1:
        if "Blackwell" in part.device.family:
            lines.append(
                "in confidential mode NVLink between Blackwell GPUs is encrypted (docs.nvidia.com/confidential-computing)"
            )
        else:
            lines.append(
                "in confidential mode NVLink between Hopper GPUs is not encrypted (docs.nvidia.com/confidential-computing)"
            )
    seller = provider(offer.cloud)
    if seller is not None:
        law = f"{offer.cloud}: {seller.kind} under the law of {seller.jurisdiction} ({seller.source})"
        lines.append(law + ("; hosts of unknown owners" if seller.kind == "marketplace" else ""))
    if part.multi_tenant_isolation not in ("", "none", "unknown"):
        lines.append(f"{part.name} can be shared by {part.multi_tenant_isolation}")
    return lines
