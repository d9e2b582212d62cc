"""Starts the processes of `hardware.together`, watches them and reads what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plait.errors import HardwareError

__all__ = ["measure_together"]


def measure_together(count: int, threads: int, *, seconds: float) -> dict[str, list[float]]:
    """Seconds of each kernel and collective, all repetitions, by figure name; `count` processes of `threads` at once.

    Raises:
        HardwareError: a process failed, all of them took over `seconds`, or what came back is no measurement.
    """
    groups = [size for size in range(2, count + 1) if count % size == 0]
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        workers = [_start(rank, count, threads, store, groups) for rank in range(count)]
        deadline = time.monotonic() + seconds
        try:
            outputs = [_output(worker, rank, count, deadline, seconds) for rank, worker in enumerate(workers)]
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                with worker:  # waits, and closes its pipes
                    pass
    found: dict[str, list[float]] = json.loads(outputs[0])
    named = {}
    for name, values in found.items():
        kind, _, rest = name.partition("/")
        if not values or not all(value > 0 for value in values):
            raise HardwareError(f"probe: measuring {name} with {count} processes gave {values} s", hint="run it again")
        named[f"{kind}/processes={count}" + (f"/{rest}" if rest else "")] = values
    return named


def _start(rank: int, count: int, threads: int, store: str, groups: list[int]) -> subprocess.Popen[str]:
    arguments = [str(rank), str(count), str(threads), store, json.dumps(groups)]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "plait.hardware.together", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            # A training process's heap is large and stays; this one's would be given back and faulted in at every kernel.
            "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
            "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        },
    )


def _output(worker: subprocess.Popen[str], rank: int, count: int, deadline: float, seconds: float) -> str:
    try:
        out, problem = worker.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise HardwareError(
            f"probe: {count} processes took over {seconds:g} s", hint="run `plait doctor`, or probe an idle computer"
        ) from None
    if worker.returncode:
        line = (problem.strip().splitlines() or ["no message"])[-1]
        raise HardwareError(f"probe: process {rank} of {count} failed: {line}", hint="run `plait doctor`")
    return out
