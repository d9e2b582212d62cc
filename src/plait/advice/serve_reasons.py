"""Why a part can serve a model, and how well its kind suits it."""

from __future__ import annotations

from plait.advice.serve_shapes import Way
from plait.cost.serving import ServingEstimate, fitted_families
from plait.hardware.builds import build_for

__all__ = ["reasons_for"]


def reasons_for(way: Way, found: ServingEstimate) -> tuple[str, ...]:
    """Precision and runtime, share of the time in what a matrix unit does, slices, status, and how sure the figure is."""
    part, choice = way.part, way.choice
    device = part.device
    reasons = [f"serves in {choice.precision} through {choice.runtime}: {choice.why}"]
    if choice.others:
        reasons.append(f"also accepted by {', '.join(choice.others)}")
    total = sum(found.parts.values())
    dense = found.parts["weights"] + found.parts["compute"] + found.parts["cache"]
    share = f"{100 * dense / total:.0f} % of the time of a step is matmul and attention" if total else ""
    reasons.append(f"{device.programmability}: {share}")
    if device.programmability == "dedicated":
        reasons.append("the rest goes through its compiler; shapes are padded to those it was compiled for")
    if not device.trains:
        reasons.append("serves compiled graphs only, it does not train")
    if way.per_instance < 1:
        reasons.append(
            f"a slice: {way.per_instance:.3g} of an accelerator that others share ({part.multi_tenant_isolation})"
        )
    if found.plan.tp > 1 and device.collective_library:
        reasons.append(f"collectives by {device.collective_library}")
    if choice.runtime in ("PyTorch", "vllm") and (build := build_for(part)) is not None:
        reasons.append(f"{build.says} ({build.source})")
    if part.status == "retired":
        reasons.append(f"no longer sold new{f'; its successor is {part.successor}' if part.successor else ''}")
    if device.family not in fitted_families():
        reasons.append(
            f"no published serving figure of {device.family} went into the estimate: rates of other families are used"
        )
    if not device.verified:
        reasons.append(f"its figures are not verified ({device.source})")
    return tuple(reasons)
