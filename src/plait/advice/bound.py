"""What no plan can beat: arithmetic at the rates the cost model allows, and memory for weights and optimizer alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from plait.cost.calibration import Calibration
from plait.cost.compute import rates
from plait.cost.memory import state_bytes
from plait.cost.placement import USABLE
from plait.cost.step import default_software
from plait.schema.cluster import Cluster, Device, Group
from plait.schema.graph import Graph
from plait.schema.plan import Plan

__all__ = ["Counted", "Precision", "count_work", "least_devices", "seconds_per_sample"]

Precision = Literal["fp32", "bf16", "fp16", "fp8"]


@dataclass(frozen=True, slots=True)
class Counted:
    """FLOP of forward and backward for one sample, and bytes that other operators read and write."""

    matmul: float
    """Matmuls and convolutions."""
    grouped: float
    """Matmuls of experts."""
    attention: float
    attention_back: float
    plain_bytes: float
    """Operators with little arithmetic, forward and backward."""
    irregular: tuple[str, ...]
    """Kinds of operator here that dedicated parts do badly."""
    parameters: int
    trained: int
    """Of `parameters`, those that are trained."""

    @property
    def flops(self) -> float:
        """All FLOP that count as the model's."""
        return self.matmul + self.grouped + self.attention + self.attention_back


def count_work(graph: Graph) -> Counted:
    """The sums over a graph's operators; backward bytes are taken as twice the forward's."""
    matmul = grouped = attention = back = plain = 0.0
    kinds: set[str] = set()
    for segment in graph.segments:
        for op in graph.segments[segment.equals].operators:
            kinds.add(op.kind)
            if op.kind == "attention":
                attention += op.flops
                back += op.backward_flops
            elif op.kind == "matmul" and "grouped_mm" in op.target:
                grouped += op.flops + op.backward_flops
            elif op.kind in ("matmul", "conv"):
                matmul += op.flops + op.backward_flops
            else:
                plain += 3.0 * (op.read_bytes + op.write_bytes)
    irregular = tuple(sorted(kinds & {"scatter", "random", "other"}))
    n = graph.batch
    return Counted(matmul / n, grouped / n, attention / n, back / n, plain / n, irregular, graph.numel,
                   sum(p.numel for p in graph.parameters if p.trainable))  # fmt: skip


def seconds_per_sample(counted: Counted, device: Device, precision: Precision, calibration: Calibration) -> float:
    """Seconds of one device for one sample's arithmetic: the cost model's own terms, everything else left out.

    Raises:
        HardwareError: a rate that it needs is not known.
    """
    at = rates(device, precision, calibration.resolve(device, default_software(_alone(device), calibration)))
    return (
        counted.matmul / at.matmul
        + counted.grouped / at.grouped
        + counted.attention / at.attention
        + counted.attention_back / at.attention_back
    )


def least_devices(counted: Counted, device: Device, precision: Precision, calibration: Calibration) -> int:
    """Devices below which weights, gradients and optimizer state alone do not fit, spread evenly.

    Raises:
        HardwareError: the device's memory is not known.
    """
    software = default_software(_alone(device), calibration)
    plain = state_bytes(Plan(precision=precision), software)
    sharded = state_bytes(Plan(fsdp=2, zero=3, precision=precision), software)
    each = min(s.weight + s.gradient + s.state for s in (plain, sharded))
    frozen = (counted.parameters - counted.trained) * plain.gathered
    return max(1, math.ceil((counted.trained * each + frozen) / (USABLE * device.need("memory_bytes"))))


def _alone(device: Device) -> Cluster:
    return Cluster(name=device.name, groups=(Group(device=device, count=1),), links=())
