"""Predicted against measured on this computer: step time and memory of several plans, after the probe alone.

    python benchmarks/predict.py [--steps 3] [--rounds 5] [--fresh-probe] [-o benchmarks/results/predict.md]

All plans are built in the same four processes and take turns, a few steps each, round by round, so that they meet the same
machine. Nothing is fitted to the measurements. The plan that `--plan auto` would pick is one of them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from plait.capture.graphs import graph_of
from plait.cost.step import estimate
from plait.hardware.local import cluster_of
from plait.hardware.probe import load_probe, probe_machine, save_probe
from plait.plan.search import search
from plait.plan.space import Space
from plait.run.processes import Workers
from plait.schema import Plan

ROOT = Path(__file__).parent.parent
TARGET = f"{ROOT}/examples/gpt.py:job"
PLANS = [
    "dp=4",
    "fsdp=4",
    "tp=4",
    "pp=4",
    "dp=2,pp=2",
    "fsdp=2,pp=2",
    "dp=2,tp=2",
    "tp=2,pp=2",
    "fsdp=2,tp=2",
    "dp=2,fsdp=2,zero=2",
]
BATCHES = (8, 16)
DEVICES = 4


def measure(target: str, cases: list[tuple[str, int]], rounds: int, steps: int) -> list[dict[str, Any]]:
    """For each (plan, batch): this process's seconds of a step, by round, and the bytes its tensors held."""
    from plait.capture import batch as batches
    from plait.capture.target import load_target
    from plait.run.meter import tensor_bytes
    from plait.run.start import start
    from plait.run.world import join

    job = load_target(target)
    rows: list[dict[str, Any]] = []
    runs = []
    for spec, batch in cases:
        plan = Plan.parse(spec).bound(batch=batch)
        peaks: list[int] = []
        before = _held()
        run = start(job, plan, batch=batch, world=join(plan))
        inputs = batches.resized(job, batch)
        run.step(*inputs)
        with tensor_bytes(peaks.append):
            run.step(*inputs)
        rows.append({"bytes": peaks[0] - before, "seconds": []})
        runs.append((run, inputs))
    for _ in range(rounds):
        for row, (run, inputs) in zip(rows, runs, strict=True):
            run.step(*inputs)
            begin = time.perf_counter()
            for _ in range(steps):
                run.step(*inputs)
            row["seconds"].append((time.perf_counter() - begin) / steps)
    return rows


def _held() -> int:
    """Bytes in tensors that are alive already: the other plans' runs."""
    from plait.run.meter import tensor_bytes

    gc.collect()
    found: list[int] = []
    with tensor_bytes(found.append):
        pass
    return found[0]


def main() -> None:
    """Predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fresh-probe", action="store_true")
    parser.add_argument("-o", type=Path, default=None)
    options = parser.parse_args()
    probe = None if options.fresh_probe else load_probe()
    if probe is None:
        probe = probe_machine(say=print)
        save_probe(probe)
    cluster = cluster_of(probe, DEVICES)
    graph, _ = graph_of(TARGET)
    cases: list[tuple[str, int]] = []
    auto: dict[int, str] = {}
    for batch in BATCHES:
        found = search(graph, cluster, batch=batch, precision="fp32", space=Space(executable=True))
        auto[batch] = found.best.bound(batch=batch).spec()
        cases += [(spec, batch) for spec in dict.fromkeys([*PLANS, auto[batch]])]
    with Workers(DEVICES, threads=1) as workers:
        by_rank = workers.call(measure, TARGET, cases, options.rounds, options.steps, timeout=3000)
    lines = [
        "| plan | batch | predicted ms | measured ms | error | predicted MiB | measured MiB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    time_errors, memory_errors, best, picked = [], [], dict.fromkeys(BATCHES, float("inf")), {}
    for i, (spec, batch) in enumerate(cases):
        plan = Plan.parse(spec).bound(batch=batch)
        predicted = estimate(graph, cluster, plan, batch=batch)
        seconds = statistics.median(max(r[i]["seconds"][k] for r in by_rank) for k in range(options.rounds))
        held = max(r[i]["bytes"] for r in by_rank)
        time_errors.append(predicted.step_time_s / seconds - 1)
        memory_errors.append(predicted.peak_memory / held - 1)
        best[batch] = min(best[batch], seconds)
        if spec == auto[batch]:
            picked[batch] = seconds
        lines.append(
            f"| {spec}{' (auto)' if spec == auto[batch] else ''} | {batch} | {1e3 * predicted.step_time_s:.0f} | "
            f"{1e3 * seconds:.0f} | {100 * time_errors[-1]:+.0f} % | {predicted.peak_memory / 2**20:.0f} | "
            f"{held / 2**20:.0f} | {100 * memory_errors[-1]:+.0f} % |"
        )
    summary = (
        f"Mean error: time {100 * statistics.fmean(map(abs, time_errors)):.0f} %, memory "
        f"{100 * statistics.fmean(map(abs, memory_errors)):.0f} %. The plan that auto picks, over the fastest: "
        + ", ".join(f"{picked[b] / best[b]:.2f} at batch {b}" for b in BATCHES)
        + "."
    )
    text = (
        f"# Predicted and measured on one computer\n\nThe demo's GPT (10.9 million parameters), {DEVICES} processes of one "
        f"thread, gloo, {os.cpu_count()} cores, {platform.machine()}, {datetime.datetime.now().astimezone():%Y-%m-%d}; "
        f"{options.rounds} rounds of {options.steps} steps, median of the slowest process. Parameters of the prediction "
        f"come from `plait hardware probe` alone.\n\n{summary}\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if options.o is not None:
        options.o.parent.mkdir(parents=True, exist_ok=True)
        options.o.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
