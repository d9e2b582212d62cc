"""Stated security needs against what the tables say of part and offer. Unknown is never yes."""

from __future__ import annotations

from plait.advice.regions import lies_in
from plait.hardware.catalogue import Accelerator
from plait.hardware.offers import Offer

__all__ = ["NEEDS", "meets"]

NEEDS = {
    "confidential": "accelerator and host run in a memory-encrypting TEE, and the offer is known to switch it on",
    "single-tenant": "bare metal: the whole host is one customer's",
    "whole-accelerator": "no slice of a shared accelerator",
    "no-marketplace": "not a marketplace of unknown hosts, nor a broker of other people's machines",
    "region=": "eu, eea, us, uk, a country's code or a region's own name",
}
# Azure's NCC series switches it on for host and GPU; NC does not (hardware/data, column confidential_computing).
_CONFIDENTIAL = (("azure", "Standard_NCC"),)
# Names under which clouds sell a whole machine without a hypervisor: AWS `*.metal`, Oracle `BM.*`.
_BARE = (("aws", ".metal"), ("oci", "BM."))
_OTHERS = {"vast": "a marketplace of unknown hosts", "shadeform": "a broker", "primeintellect": "a broker"}


def meets(need: str, part: Accelerator, offer: Offer) -> tuple[bool, str]:
    """Whether the tables say that the offer meets `need`, and the reason in words."""
    if need.startswith("region="):
        return lies_in(offer, need.removeprefix("region="))
    if need == "confidential":
        if part.confidential_computing != "yes":
            return False, f"confidential computing of {part.name}: {part.confidential_computing}"
        on = any(offer.cloud == cloud and offer.instance_type.startswith(name) for cloud, name in _CONFIDENTIAL)
        return on, "the series has it on" if on else f"{offer.cloud} {offer.instance_type} is not known to switch it on"
    if need == "single-tenant":
        bare = any(offer.cloud == cloud and name in offer.instance_type for cloud, name in _BARE)
        return (
            bare,
            "bare metal"
            if bare
            else f"{offer.cloud} {offer.instance_type}: other tenants of the host are not ruled out",
        )
    if need == "whole-accelerator":
        whole = offer.count >= 1
        return whole, "whole" if whole else f"{offer.instance_type} is {offer.count:g} of an accelerator"
    other = _OTHERS.get(offer.cloud)
    return other is None, f"{offer.cloud} is {other}" if other else "the cloud's own machines"
