"""This computer as a cluster of processes, from its probe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from plait.errors import HardwareError
from plait.hardware.probe import Probe, load_probe
from plait.hardware.together import KERNELS, KERNELS_RUN, MESSAGES, WORK
from plait.schema.cluster import Cluster, Device, Group, Link
from plait.schema.timing import Timing

__all__ = ["cluster_of", "local_cluster"]


def local_cluster(devices: int) -> Cluster:
    """`devices` processes of this computer, as its kept probe measured it.

    Raises:
        HardwareError: there is no probe.
    """
    probe = load_probe()
    if probe is None:
        raise HardwareError(
            "this computer has not been measured yet", hint="run `plait hardware probe` once, it takes about a minute"
        )
    return cluster_of(probe, devices)


def cluster_of(probe: Probe, devices: int) -> Cluster:
    """`devices` processes of the probed computer, from what the probe measured with as many at once.

    Processes share the cores (`shared_cores`, see `plait.cost.cores`). While there are cores enough each has its own
    threads; beyond that each runs on one core's worth while it runs. A number of processes that was not measured takes the
    figures of the nearest one.

    Raises:
        HardwareError: `devices` is below 1, or the probe lacks a figure.
    """
    if devices < 1:
        raise HardwareError(f"devices={devices} must be at least 1")
    cores = probe.cores
    threads = max(1, cores // devices)
    count = _nearest(probe, devices, cores)
    rates = _Rates.of(probe, count)
    device = Device(
        name=f"{probe.processor} ({threads} threads)",
        peak_flops=_peaks(probe, rates.matmul),
        memory_bytes=probe.memory_bytes / devices,
        memory_bandwidth=rates.elementwise,
        family="local",
        category="cpu",
        programmability="general",
        torch_device="cpu",
        collective_library=probe.backend,
        efficiency=_efficiency(probe, rates, count),
        verified=True,
        source=f"measured on {probe.host}, {probe.date}, torch {probe.torch_version}, {count} processes at once",
    )
    links = (_link(probe, devices, count),) if devices > 1 else ()
    notes: tuple[str, ...] = (f"{devices} processes share {cores} cores",) if devices > cores else ()
    if count != devices:
        notes += (f"measured with {count} processes at once, not {devices}",)
    return Cluster(
        name=f"{devices}xcpu",
        groups=(Group(device=device, count=devices, usd_per_hour=0.0, price_source="this computer"),),
        links=links,
        shared_cores=cores,
        notes=notes,
    )


def _nearest(probe: Probe, devices: int, cores: int) -> int:
    """The measured number of processes at once that is most like `devices`: as many, or the nearest by ratio.

    Several devices need collectives; where they are more than the cores, so should the measured ones be.
    """
    measured = [count for count in probe.processes if count > 1 or devices == 1]
    if not measured:
        raise HardwareError(
            f"the probe of {probe.host} has no processes measured together", hint="run `plait hardware probe` again"
        )
    return min(measured, key=lambda n: ((n > cores) != (devices > cores), abs(math.log(n / devices)), n))


@dataclass(frozen=True)
class _Rates:
    """What a process reaches while all work, by seconds in which it has its cores."""

    matmul: float
    """FLOP/s of large square matmuls, their memory traffic taken out."""
    traffic: float
    """Bytes/s of that traffic; infinite where the two matmuls show none."""
    attention: float
    attention_back: float
    elementwise: float
    """Bytes/s of a norm, a GELU and an addition, forward and backward."""
    optimizer: float
    kernel: float
    """Seconds of one small operator, autograd and interpreter included."""

    @classmethod
    def of(cls, probe: Probe, count: int) -> _Rates:
        """From the kernels of `count` processes at once."""
        seconds = {name: probe.value(f"{name}/processes={count}") for name in KERNELS}
        # square: f1 / rate + b1 / traffic = t1, thin: the same with few rows; solved for both.
        (f1, b1), (f2, b2) = WORK["matmul"], WORK["thin_matmul"]
        t1, t2 = seconds["matmul"], seconds["thin_matmul"]
        whole = f1 * b2 - f2 * b1
        per_flop, per_byte = (t1 * b2 - t2 * b1) / whole, (f1 * t2 - f2 * t1) / whole
        if per_byte <= 0 or per_flop <= 0:
            per_flop, per_byte = t1 / f1, 0.0
        both = ("elementwise", "elementwise_back")
        return cls(
            matmul=1 / per_flop,
            traffic=1 / per_byte if per_byte else math.inf,
            attention=WORK["attention"][0] / seconds["attention"],
            attention_back=WORK["attention_back"][0] / seconds["attention_back"],
            elementwise=sum(WORK[name][1] for name in both) / sum(seconds[name] for name in both),
            optimizer=WORK["optimizer"][1] / seconds["optimizer"],
            kernel=seconds["kernel"] / KERNELS_RUN,
        )


def _peaks(probe: Probe, fp32: float) -> dict[str, float]:
    """FLOP/s by precision; bf16 by what it gains over fp32 in one process on one core."""
    found = {"fp32": fp32}
    sizes = _sizes(probe, "bf16", "threads=1")
    if sizes:
        where = f"{sizes[-1]}/threads=1"
        found["bf16"] = fp32 * probe.value(f"matmul/bf16/{where}") / probe.value(f"matmul/fp32/{where}")
    return found


def _sizes(probe: Probe, precision: str, where: str) -> list[int]:
    return sorted(
        int(f.name.split("/")[2])
        for f in probe.figures
        if f.name.startswith(f"matmul/{precision}/") and f.name.endswith("/" + where)
    )


def _efficiency(probe: Probe, rates: _Rates, count: int) -> dict[str, float]:
    """The cost model's parameters on this processor, all measured: ratios to the device's matmul rate and bandwidth."""
    # The loss is summed over all processes at the end of a step, and the norm of the gradients.
    step = 2 * probe.value(f"all_reduce/processes={count}/ranks={count}/{MESSAGES[0]}") if count > 1 else 0.0
    return {
        "matmul": 1.0,
        "attention": rates.attention / rates.matmul,
        "attention_back": rates.attention_back / rates.matmul,
        "memory": 1.0,
        "fusion": 1.0,
        "traffic": rates.elementwise / rates.traffic,
        "optimizer": rates.optimizer / rates.elementwise,
        "kernel": rates.kernel,
        "launch": 0.0,  # the host is the device: a kernel's time holds its start
        "launch_collective": 0.0,
        "step": step,
        "node": 1.0,
        "messages": 1 / 4,  # plait sums gradients in buckets and gathers whole blocks, of several segments each
        **probe.factors,
    }


def _link(probe: Probe, devices: int, count: int) -> Link:
    """What processes exchange, as measured; bandwidth and latency are those of the all-reduce over all."""
    timings = tuple(_timings(probe, devices, count))
    whole = sorted((t for t in timings if t.collective == "all_reduce" and t.ranks == count), key=lambda t: t.nbytes)
    if len(whole) < 2:
        raise HardwareError(
            f"the probe of {probe.host} measured no collectives", hint="run `plait hardware probe` again"
        )
    small, large = (t.core + t.wait for t in (whole[0], whole[-1]))
    return Link(
        level="node",
        size=devices,
        bandwidth=2 * (count - 1) / count * whole[-1].nbytes / max(large - small, 1e-9),
        latency=small / (2 * math.ceil(math.log2(count))),
        name=probe.backend,
        source=f"collectives of {count} processes on {probe.host}, {probe.date}",
        timings=timings,
    )


def _timings(probe: Probe, devices: int, count: int) -> Iterator[Timing]:
    """The probe's collectives, split into seconds of a core and the wait beside them."""
    threads = max(1, probe.cores // devices)
    share = max(1.0, count / probe.cores)
    for figure in probe.figures:
        collective, _, rest = figure.name.partition(f"/processes={count}/ranks=")
        if not rest or collective.endswith("_core"):
            continue
        ranks, size = rest.split("/")
        core = probe.value(f"{collective}_core/processes={count}/ranks={rest}")
        yield Timing(
            collective=collective,
            ranks=int(ranks),
            nbytes=float(size),
            core=core / threads,  # a process with several cores loses one of them
            wait=max(0.0, figure.value - share * core),
        )
