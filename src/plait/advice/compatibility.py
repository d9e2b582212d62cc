"""Whether a model trains on a part, in which precision, by which path; and what a dedicated part means for it."""

from __future__ import annotations

from dataclasses import dataclass

from plait.advice.bound import Counted, Precision, seconds_per_sample
from plait.advice.runtimes import runtimes
from plait.cost.calibration import load_calibration
from plait.errors import HardwareError
from plait.hardware.catalogue import Accelerator
from plait.schema.records import Record

__all__ = ["Compatibility", "can_be_costed", "compatibility", "training_precision"]

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


def training_precision(part: Accelerator) -> tuple[Precision | None, str]:
    """(precision to train in, why); None where the part cannot train, with the reason.

    bf16 where the part states it, fp16 where it states only that, fp32 where neither.
    """
    device = part.device
    if not device.trains:
        return None, f"{part.name} runs compiled inference graphs only and cannot train"
    if not device.torch_device:
        return None, f"{part.name} has no device in a PyTorch build that plait knows"
    words: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
    rates: list[tuple[Precision, float]] = [(w, device.peak_flops[w]) for w in words if w in device.peak_flops]
    if not rates:
        return None, f"{part.name}: no source states its bf16, fp16 or fp32 rate"
    half = rates[0][0]
    if half == "fp16" and device.peak_flops.get("fp32", 0) > device.peak_flops["fp16"]:
        return "fp32", "its fp16 is slower than its fp32"
    why = {
        "bf16": "bf16 is stated",
        "fp16": "no bf16 is stated: fp16 needs loss scaling",
        "fp32": "only fp32 is stated",
    }
    return half, why[half]


def compatibility(part: Accelerator, counted: Counted, precision: Precision, why: str) -> Compatibility:
    """The part's path for this model, with reasons.

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
    reasons = [f"trains in {precision}: {why}", f"runs through {path}"]
    served = [r.name for r in runtimes() if r.takes(part)]
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
    if device.torch_device == "xla":
        reasons.append("plait estimates it, but plait's own runtime has not been run on XLA devices")
    if part.status == "retired":
        reasons.append(f"no longer sold new{f'; its successor is {part.successor}' if part.successor else ''}")
    if not device.verified:
        reasons.append(f"its figures are not verified ({device.source})")
    return Compatibility(
        precision=precision,
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
