"""Measures this computer: matmul by size and dtype, memory bandwidth, small operators, collectives, threads.

Everything is repeated and given with its spread. What cannot be measured raises; it is never written down as zero.
"""

from __future__ import annotations

import datetime
import functools
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.errors import HardwareError
from plait.hardware.probe_group import measure_together
from plait.hardware.together import usable_cores
from plait.schema.records import Record

__all__ = ["Measured", "Probe", "cache_path", "load_probe", "probe_machine", "save_probe"]

_SIZES = (64, 128, 256, 512, 1024, 2048)
_LIMIT = 120.0  # s, for the whole probe


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured(Record):
    """One figure with its spread."""

    name: str
    value: float
    unit: str
    spread: float
    """(largest - smallest) / median of the repetitions."""
    repeats: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe(Record):
    """What was measured, by name.

    `matmul/fp32/1024/threads=1`, `copy/threads=2`: one process, its rate. `matmul/processes=4`: seconds of one run of a
    kernel (`hardware.together.WORK`) on one process's cores while so many processes repeat it.
    `all_reduce/processes=4/ranks=2/65536`: seconds in groups of two of the four, all at once, between pieces of compute;
    `all_reduce_core/...`: the part of that in which a core was busy with it, in each process.
    """

    host: str
    processor: str
    cores: int
    memory_bytes: float
    backend: str
    torch_version: str
    date: str
    seconds: float
    figures: tuple[Measured, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)
    factors: dict[str, float] = field(default_factory=dict)
    """What runs corrected since (`hardware.calibrate`): `scale` of the rates, `node` of the collectives."""

    def value(self, name: str) -> float:
        """The figure called `name`.

        Raises:
            HardwareError: it was not measured.
        """
        for figure in self.figures:
            if figure.name == name:
                return figure.value
        raise HardwareError(f"the probe of {self.host} has no figure {name}", hint="run `plait hardware probe` again")

    @property
    def processes(self) -> tuple[int, ...]:
        """The numbers of processes at once that were measured."""
        names = (figure.name.partition("matmul/processes=") for figure in self.figures)
        return tuple(sorted(int(count) for before, sign, count in names if sign and not before))

    def has(self, name: str) -> bool:
        """Whether the figure was measured."""
        return any(figure.name == name for figure in self.figures)


def cache_path() -> Path:
    """Where the last probe of this computer is kept."""
    root = Path(os.environ.get("PLAIT_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "plait" / f"probe-{socket.gethostname()}.json"


def load_probe() -> Probe | None:
    """The kept probe of this computer; None where there is none or it belongs to other hardware."""
    try:
        found = Probe.from_json(cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.cores == usable_cores() and found.processes else None


def save_probe(probe: Probe) -> Path:
    """Keeps the probe for later; gives back where."""
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(probe.to_json() + "\n", encoding="utf-8")
    return path


def _memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError) as problem:
        raise HardwareError(f"this computer does not say how much memory it has: {problem}") from None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _repeat(action: Callable[[], Any], *, budget: float, least: int = 3, most: int = 15) -> list[float]:
    """Seconds of repeated runs, after one that is not counted."""
    action()
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < least or (time.perf_counter() - began < budget and len(found) < most):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return found


def _figure(name: str, seconds: list[float], unit: str, work: float) -> Measured:
    """The figure `work` / time; for times themselves `work` is 0.

    The time is that of the first quartile: what is slower was interrupted by other work of the computer, and the spread
    shows how much of that there was.
    """
    middle = statistics.median(seconds)
    quick = sorted(seconds)[(len(seconds) - 1) // 4]
    if not quick > 0:
        raise HardwareError(f"measuring {name} gave {quick} s: the clock is too coarse", hint="run the probe again")
    value = work / quick if work else quick
    return Measured(
        name=name, value=value, unit=unit, spread=(max(seconds) - min(seconds)) / middle, repeats=len(seconds)
    )


def probe_machine(*, processes: tuple[int, ...] = (1, 2, 4), say: Callable[[str], None] = lambda _: None) -> Probe:
    """Measures this computer's CPU in at most two minutes, with as many `processes` at once as each says.

    Raises:
        HardwareError: a measurement failed.
    """
    import torch

    began = time.perf_counter()
    cores = usable_cores()
    figures: list[Measured] = []
    threads_before = torch.get_num_threads()
    try:
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            say(f"matrix multiply and memory, {threads} threads")
            figures += _compute(torch, threads)
    finally:
        torch.set_num_threads(threads_before)
    notes = []
    for count in processes:
        if time.perf_counter() - began > _LIMIT / 2:
            notes.append(f"{count} processes at once were left out: the probe would take over {_LIMIT:g} s")
            continue
        say(f"kernels and gloo's collectives, {count} processes at once")
        repetitions = measure_together(count, max(1, cores // count), seconds=_LIMIT / 2)
        figures += [_figure(name, seconds, "s", 0.0) for name, seconds in repetitions.items()]
    return Probe(
        host=socket.gethostname(),
        processor=_processor(),
        cores=cores,
        memory_bytes=_memory(),
        backend="gloo",
        torch_version=str(torch.__version__),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        seconds=time.perf_counter() - began,
        figures=tuple(figures),
        notes=tuple(notes),
    )


def _compute(torch: Any, threads: int) -> list[Measured]:
    """Matmul by size and dtype, a copy and an addition beyond the caches, and the smallest operator."""
    found = []
    where = f"threads={threads}"
    with torch.no_grad():
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for size in _SIZES:
                if name == "bf16" and size > 512:
                    continue
                a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
                out = torch.empty(size, size, dtype=dtype)
                seconds = _repeat(functools.partial(torch.mm, a, b, out=out), budget=0.3)
                found.append(_figure(f"matmul/{name}/{size}/{where}", seconds, "FLOP/s", 2.0 * size**3))
        source, target = torch.ones(16 << 20), torch.empty(16 << 20)
        seconds = _repeat(lambda: target.copy_(source), budget=0.4)
        found.append(_figure(f"copy/{where}", seconds, "B/s", 2.0 * 4 * source.numel()))
        middle = torch.ones(1 << 18)
        seconds = _repeat(lambda: torch.add(middle, middle), budget=0.2, most=200)
        found.append(_figure(f"add/{where}", seconds, "B/s", 3.0 * 4 * middle.numel()))
        tiny = torch.ones(8)

        def many() -> None:
            for _ in range(200):
                torch.add(tiny, tiny)

        seconds = [s / 200 for s in _repeat(many, budget=0.1)]
        found.append(_figure(f"operator/{where}", seconds, "s", 0.0))
    return found
