"""Whether a model trains on a part, in which precision, by which path; and what a dedicated part means for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from plait.advice.bound import Counted, Precision, seconds_per_sample
from plait.advice.runtimes import runtimes
from plait.cost.calibration import load_calibration
from plait.errors import HardwareError
from plait.hardware.builds import build_for
from plait.hardware.catalogue import Accelerator
from plait.schema.records import Record

__all__ = ["Compatibility", "at_tf32", "can_be_costed", "compatibility", "training_precision"]

_PATHS = {
    "cuda": "PyTorch/CUDA",
    "xla": "PyTorch/XLA",
    "npu": "PyTorch with torch_npu (CANN)",
    "hpu": "PyTorch with Habana's HPU bridge",
    "xpu": "PyTorch/XPU",
    "mps": "PyTorch/MPS",
    "cpu": "PyTorch on CPU",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Compatibility(Record):
    """What running this model on one part means."""

    precision: str
    path: str
    collective_library: str
    programmability: str
    dense_share: float
    """Of the ideal time, in matmul, convolution and attention: what a matrix unit does well."""
    reasons: tuple[str, ...]


def training_precision(part: Accelerator, wanted: str = "", *, runnable: bool = False) -> tuple[Precision | None, str]:
    """(precision of the plan, why); None where the part cannot train so, with the reason.

    bf16 where the part states it, fp16 where it states only that (fp32 with `runnable`: plait's runtime scales no
    losses), fp32 where neither; or what is `wanted`. tf32 is fp32 with matmuls at the rate of `at_tf32`.
    """
    device = part.device
    if not device.trains:
        return None, f"{part.name} runs compiled inference graphs only and cannot train"
    if not device.torch_device:
        return None, f"{part.name} has no device in a PyTorch build that plait knows"
    build = build_for(part)
    if build is not None and not build.runs:
        return None, f"{part.name}: {build.says} ({build.source})"
    if wanted:
        if wanted not in device.peak_flops:
            return None, f"{part.name}: no source states its {wanted} rate"
        plan: Precision = "fp32" if wanted == "tf32" else cast("Precision", wanted)
        return plan, _ASKED.get(wanted, "as asked for")
    words: tuple[Precision, ...] = ("bf16", "fp32") if runnable else ("bf16", "fp16", "fp32")
    found = next((word for word in words if word in device.peak_flops), None)
    if found is None:
        if "fp16" in device.peak_flops:
            return None, f"{part.name} states fp16 alone, which plait's runtime does not train in (--any-plan)"
        return None, f"{part.name}: no source states its bf16, fp16 or fp32 rate"
    if found == "fp16" and device.peak_flops.get("fp32", 0) > device.peak_flops["fp16"]:
        return "fp32", "its fp16 is slower than its fp32"
    if found == "fp32" and "fp16" in device.peak_flops:
        return "fp32", "no bf16 is stated, and plait's runtime does not train in fp16 (--precision fp16 plans it)"
    why = {
        "bf16": "bf16 is stated",
        "fp16": "no bf16 is stated: fp16 needs loss scaling",
        "fp32": "only fp32 is stated",
    }
    return found, why[found]


_ASKED = {
    "fp16": "as asked for; it needs loss scaling",
    "fp8": "as asked for: matmuls with weights in fp8, the rest in bf16",
    "tf32": "as asked for: fp32 with matmuls in tf32, torch.set_float32_matmul_precision('high') in the target",
}


def at_tf32(part: Accelerator) -> Accelerator:
    """`part` whose fp32 matmuls run in tf32."""
    rates = {**part.device.peak_flops, "fp32": part.device.peak("tf32")}
    return replace(part, device=replace(part.device, peak_flops=rates))


def compatibility(
    part: Accelerator, counted: Counted, precision: Precision, why: str, asked: str = ""
) -> Compatibility:
    """The part's path for this model, with reasons; `asked` is the precision that was asked for.

    Raises:
        HardwareError: a rate or the memory bandwidth is not known.
    """
    device = part.device
    path = "PyTorch/ROCm" if device.torch_device == "cuda" and part.vendor == "AMD" else _PATHS[device.torch_device]
    if part.vendor == "AWS" and device.torch_device == "xla":
        path = "PyTorch/XLA (Neuron)"
    dense = seconds_per_sample(counted, device, precision, load_calibration())
    rest = counted.plain_bytes / device.need("memory_bandwidth")
    share = dense / (dense + rest) if dense + rest else 0.0
    reasons = [f"trains in {asked or precision}: {why}", f"runs through {path}"]
    # A model without attention is no decoder that LLM runtimes take.
    served = [r.name for r in runtimes() if r.takes(part) and (r.forwards or counted.attention > 0)]
    reasons.append(
        f"what is trained can be served here by {', '.join(served)}"
        if served
        else "no inference runtime is known to accept it"
    )
    if device.collective_library:
        reasons.append(f"collectives by {device.collective_library}")
    if device.programmability == "dedicated":
        text = f"dedicated: about {100 * share:.0f} % of the ideal time is in operators its matrix unit does well"
        if counted.irregular:
            text += f"; {', '.join(counted.irregular)} operators go through its compiler and may be slow"
        reasons.append(text)
    else:
        reasons.append(
            f"{device.programmability}: any operator runs; {100 * share:.0f} % of the ideal time is matmul and attention"
        )
    if (build := build_for(part)) is not None:
        reasons.append(f"{build.says} ({build.source})")
    if device.torch_device == "xla":
        reasons.append("plait estimates it, but plait's own runtime has not been run on XLA devices")
    if part.status == "retired":
        reasons.append(f"no longer sold new{f'; its successor is {part.successor}' if part.successor else ''}")
    if not device.verified:
        reasons.append(f"its figures are not verified ({device.source})")
    return Compatibility(
        precision=asked or precision,
        path=path,
        collective_library=device.collective_library,
        programmability=device.programmability,
        dense_share=share,
        reasons=tuple(reasons),
    )


def can_be_costed(part: Accelerator, counted: Counted, precision: Precision) -> str:
    """Why no time can be estimated on `part`; '' where it can."""
    try:
        seconds_per_sample(counted, part.device, precision, load_calibration())
        part.device.need("memory_bytes")
    except HardwareError as problem:
        return problem.message
    return ""
