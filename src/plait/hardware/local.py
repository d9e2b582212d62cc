"""This computer as a cluster of processes, from its probe."""

from __future__ import annotations

import math

from plait.errors import HardwareError
from plait.hardware.probe import Probe, load_probe
from plait.schema.cluster import Cluster, Device, Group, Link

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
    """`devices` processes of the probed computer.

    Processes share the cores. As long as there are cores enough each has its own threads; beyond that each runs on one
    core's worth while it runs, and all together are no faster than all cores (`shared_cores`).
    """
    if devices < 1:
        raise HardwareError(f"devices={devices} must be at least 1")
    cores = probe.cores
    threads = max(1, cores // devices)
    measured = threads if probe.has(f"copy/threads={threads}") else (1 if threads < cores else cores)
    scale = threads / measured
    where = f"threads={measured}"
    # All cores busy at once are slower than one alone: what each gets when every process works.
    together = min(1.0, _best(probe, "fp32", f"threads={cores}") / (cores * _best(probe, "fp32", "threads=1")))
    busy = together if devices >= cores else 1.0
    peaks = {p: _best(probe, p, where) * scale * busy for p in ("fp32", "bf16") if _sizes(probe, p, where)}
    share = min(1.0, cores / devices)
    bandwidth = min(
        probe.value(f"add/{where}") * scale, probe.value(f"copy/threads={cores}") * 2 / max(1, min(devices, cores))
    )
    device = Device(
        name=f"{probe.processor} ({threads} threads)",
        peak_flops=peaks,
        memory_bytes=probe.memory_bytes / devices,
        memory_bandwidth=bandwidth,
        family="local",
        category="cpu",
        programmability="general",
        torch_device="cpu",
        collective_library=probe.backend,
        efficiency=_efficiency(probe, where),
        verified=True,
        source=f"measured on {probe.host}, {probe.date}, torch {probe.torch_version}",
    )
    links = (_link(probe, devices),) if devices > 1 else ()
    return Cluster(
        name=f"{devices}xcpu",
        groups=(Group(device=device, count=devices, usd_per_hour=0.0, price_source="this computer"),),
        links=links,
        shared_cores=cores,
        notes=(f"{devices} processes share {cores} cores",) if share < 1 else (),
    )


def _sizes(probe: Probe, precision: str, where: str) -> list[int]:
    return sorted(
        int(f.name.split("/")[2])
        for f in probe.figures
        if f.name.startswith(f"matmul/{precision}/") and f.name.endswith("/" + where)
    )


def _best(probe: Probe, precision: str, where: str) -> float:
    """FLOP/s of the largest matmuls."""
    rates = [probe.value(f"matmul/{precision}/{size}/{where}") for size in _sizes(probe, precision, where)]
    if not rates:
        raise HardwareError(f"the probe of {probe.host} has no {precision} matmul with {where}", hint="run it again")
    return max(rates)


def _efficiency(probe: Probe, where: str) -> dict[str, float]:
    """The cost model's parameters on this processor; the matmul's small sizes give the time of one kernel."""
    operator = probe.value(f"operator/{where}")
    return {
        "matmul": 0.9,  # shapes of layers reach nine tenths of the best square one
        "memory": 1.0,
        "traffic": 0.3,
        "kernel": operator,
        "launch": 4 * operator,  # autograd and the interpreter, in multiples of the bare operator
        "launch_collective": 4 * operator,
        "optimizer": 0.5,
        "attention": 0.5,
        "attention_back": 0.5,
        "node": 1.0,
        "node_latency": 1.0,
    }


def _link(probe: Probe, devices: int) -> Link:
    """Bandwidth and latency of a ring of processes, from the largest and the smallest all-reduce."""
    measured = sorted(
        {int(f.name.split("/")[1].split("=")[1]) for f in probe.figures if f.name.startswith("all_reduce/")}
    )
    if not measured:
        raise HardwareError(
            f"the probe of {probe.host} measured no collectives", hint="run `plait hardware probe` again"
        )
    ranks = min(measured, key=lambda count: (abs(count - devices), -count))
    sizes = sorted(int(f.name.split("/")[2]) for f in probe.figures if f.name.startswith(f"all_reduce/ranks={ranks}/"))
    small = probe.value(f"all_reduce/ranks={ranks}/{sizes[0]}")
    large = probe.value(f"all_reduce/ranks={ranks}/{sizes[-1]}")
    latency = small / (2 * math.ceil(math.log2(ranks)))
    bandwidth = 2 * (ranks - 1) / ranks * sizes[-1] / max(large - small, 1e-9)
    return Link(
        level="node", size=devices, bandwidth=bandwidth, latency=latency, name=probe.backend,
        source=f"all-reduce of {ranks} processes on {probe.host}, {probe.date}",
    )  # fmt: skip
