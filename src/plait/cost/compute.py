"""Seconds of one segment's forward and backward: a roofline whose two sides add up in part.

    t = FLOP / (peak x efficiency) + traffic x bytes / bandwidth + kernels x least kernel time,

for matmuls, so that small and thin ones, with more bytes for each FLOP, are slower; operators with little arithmetic
cost their bytes. The host starts operators one by one: a segment takes the longer of host and device.
Source: Williams, Waterman and Patterson (2009), roofline. Known error: 5-10 % on single large matmuls (clock
and power limits), up to a factor of two on kernels below 20 us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from plait.cost.work import Pass, Work
from plait.schema.cluster import Device

__all__ = ["Rates", "host_seconds", "pass_seconds", "rates", "recompute_seconds"]

_LOW = ("fp8", "fp4")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What one device reaches, in FLOP/s, bytes/s and seconds."""

    matmul: float
    grouped: float
    attention: float
    attention_back: float
    plain_bandwidth: float
    """Of operators with little arithmetic, in eager PyTorch's bytes."""
    traffic_bandwidth: float
    """Of the matmul traffic that arithmetic does not hide."""
    optimizer_bandwidth: float
    kernel: float
    launch: float
    launch_collective: float


def rates(device: Device, precision: str, parameters: Mapping[str, float]) -> Rates:
    """The rates of `device` at `precision`.

    fp8 and fp4 are for matmuls with weights; attention stays in bf16.

    Raises:
        HardwareError: a rate or the memory bandwidth is not known.
    """
    bandwidth = device.need("memory_bandwidth")
    scale = parameters["scale"]
    if precision in _LOW:
        half = device.peak("bf16") * parameters["matmul"]
        dense = device.peak(precision) * parameters["matmul_low"]
    else:
        half = dense = device.peak(precision) * parameters["matmul"]
    half, dense, bandwidth = half * scale, dense * scale, bandwidth * scale
    return Rates(
        matmul=dense,
        grouped=dense * parameters["grouped"],
        attention=half * parameters["attention"],
        attention_back=half * parameters["attention_back"],
        plain_bandwidth=bandwidth * parameters["memory"] / parameters["fusion"],
        traffic_bandwidth=bandwidth * parameters["memory"] / max(1e-6, parameters["traffic"]),
        optimizer_bandwidth=bandwidth * parameters["optimizer"],
        kernel=parameters["kernel"],
        launch=parameters["launch"],
        launch_collective=parameters["launch_collective"],
    )


def pass_seconds(work: Pass, at: Rates, *, backward: bool = False, low_bytes: float = 0.0) -> float:
    """Seconds that the device needs for a forward or backward, however late the host starts its operators.

    `low_bytes` are read and written to convert matmul inputs to fp8.
    """
    return (
        work.matmul_flops / at.matmul
        + work.grouped_flops / at.grouped
        + work.attention_flops / (at.attention_back if backward else at.attention)
        + (work.matmul_bytes + work.attention_bytes) / at.traffic_bandwidth
        + (work.memory_bytes + low_bytes) / at.plain_bandwidth
        + work.operators * at.kernel
    )


def host_seconds(work: Pass, at: Rates, collectives: int) -> float:
    """Seconds that the host needs to start a pass's operators and collectives."""
    return work.operators * at.launch + collectives * at.launch_collective


def recompute_seconds(work: Work, choice: str, at: Rates) -> float:
    """Seconds of the forward work that the backward does again under `choice`."""
    if choice == "full":
        return pass_seconds(work.forward, at)
    if choice == "selective":
        return pass_seconds(work.again_selective, at)
    return 0.0
