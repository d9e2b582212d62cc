from __future__ import annotations

import pytest

from plait.hardware.probe import Measured, Probe
from plait.hardware.together import WORK


def figure(name, value, unit="s"):
    return Measured(name=name, value=value, unit=unit, spread=0.1, repeats=5)


def kernels(count, rate):
    """Every kernel at `rate` FLOP/s, ten bytes taking as long as a FLOP."""
    seconds = {name: flops / rate + nbytes * 10 / rate for name, (flops, nbytes) in WORK.items() if name != "kernel"}
    return tuple(figure(f"{name}/processes={count}", value) for name, value in {**seconds, "kernel": 5e-5}.items())


def collectives(count, ranks):
    return tuple(
        figure(f"{kind}{part}/processes={count}/ranks={ranks}/{size}", seconds)
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "send")
        for size, whole, core in ((4096, 1e-3, 2e-4), (1 << 20, 5e-3, 2e-3))
        for part, seconds in (("", whole), ("_core", core))
    )


PROBE = Probe(
    host="here", processor="test", cores=2, memory_bytes=8e9, backend="gloo", torch_version="2", date="2026-01-01",
    seconds=1.0,
    figures=(
        figure("matmul/fp32/512/threads=1", 5e10), figure("matmul/bf16/512/threads=1", 2e11),
        *kernels(1, 1e11), *kernels(2, 5.5e10), *collectives(2, 2), *kernels(4, 5e10), *collectives(4, 4),
        *collectives(4, 2),
    ),
)  # fmt: skip


@pytest.fixture
def probe():
    """A computer of two cores, measured with one, two and four processes at once."""
    return PROBE
