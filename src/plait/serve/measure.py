"""Latencies of several functions, taken in turn, so that what else goes on on the machine meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["interleaved", "summary"]

_BLOCK = 5  # calls in a row; runtimes spin for a moment after a call, which would fall into another one's time
_LEAST, _MOST = 20, 400  # calls


def interleaved(runs: Mapping[str, Callable[[], Any]], *, budget: float) -> dict[str, list[float]]:
    """Seconds of every measured call of each function: blocks in turn until `budget` seconds are spent on all of them.

    At least 20 calls of each (5 where one takes a second or more). Each is called three times beforehand, and
    the first call of a block does not count, unless a call takes longer than a fifth of a second.
    """
    slowest = 0.0
    for run in runs.values():
        for _ in range(3):
            begin = time.perf_counter()
            run()
            last = time.perf_counter() - begin
            if last > 1.0:
                break
        slowest = max(slowest, last)
    times: dict[str, list[float]] = {name: [] for name in runs}
    block = _BLOCK if slowest < 0.2 else 1
    least = _LEAST if slowest < 1.0 else 5
    names = list(runs)
    stop = time.perf_counter() + budget
    while True:
        for name in names:
            run = runs[name]
            if block > 1:
                run()
            for _ in range(block):
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
        names = [*names[1:], names[0]]
        count = min(map(len, times.values()))
        if count >= _MOST or (count >= least and time.perf_counter() > stop):
            return times


def summary(seconds: list[float], batch: int) -> dict[str, float | int]:
    """p50 and p99 in milliseconds, and samples per second at the median."""
    ordered = sorted(seconds)
    p50 = ordered[len(ordered) // 2]
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"p50_ms": p50 * 1e3, "p99_ms": p99 * 1e3, "samples_per_s": batch / p50, "calls": len(ordered)}
