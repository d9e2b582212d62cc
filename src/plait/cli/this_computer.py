"""This computer, to be compared with what can be rented: as it was probed, else measured in a second."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from plait.schema import Cluster, Device, Graph, Group

__all__ = ["this_computer"]

_SMALL = 1e9  # parameters above which no CPU is an answer worth a second's measurement
_SIZE = 768  # of the square matmul; large enough for a BLAS library's best rate, small enough for milliseconds


def this_computer(graph: Graph) -> Cluster | None:
    """One process on this computer's CPU; None where it was never probed and the model is no small one."""
    from plait.errors import HardwareError

    try:
        return Cluster.local(devices=1)
    except HardwareError:
        return _measured() if graph.numel < _SMALL else None


def _measured() -> Cluster | None:
    """A cluster from one matmul and one addition of arrays; None where memory cannot be read.

    `plait hardware probe` measures far more: sizes, threads, kernels, collectives.
    """
    import numpy as np

    memory = _memory()
    if memory is None:
        return None
    left = np.ones((_SIZE, _SIZE), dtype=np.float32)
    flops = 2.0 * _SIZE**3 / _best(lambda: left @ left)
    wide = np.ones(1 << 24, dtype=np.float32)
    out = np.empty_like(wide)
    bandwidth = 3.0 * wide.nbytes / _best(lambda: np.add(wide, wide, out=out))
    device = Device(
        name="CPU of this computer",
        peak_flops={"fp32": flops},
        memory_bytes=memory,
        memory_bandwidth=bandwidth,
        family="local",
        category="cpu",
        programmability="general",
        torch_device="cpu",
        efficiency={"matmul": 0.9, "memory": 1.0},
        verified=True,
        source="measured in a second; `plait hardware probe` measures it well",
    )
    return Cluster(
        name="1xcpu",
        groups=(Group(device=device, count=1, usd_per_hour=0.0, price_source="this computer"),),
        links=(),
        shared_cores=os.cpu_count(),
        notes=("this computer was measured in a second: `plait hardware probe` measures it well",),
    )


def _best(work: Callable[[], object]) -> float:
    """Seconds of the quickest run within a third of a second."""
    least, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.35:
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return least


def _memory() -> float | None:
    """Bytes that are free for a new process, from /proc; None on other systems."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return None
