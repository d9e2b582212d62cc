"""Predicted against measured on this computer: step time and memory of several plans, after the probe alone.

    python benchmarks/predict.py [--batch 8] [--target T] [--devices 4] [--plans P...] [--rows rows.jsonl] [-o predict.md]

All plans of a run are built in the same processes and take turns, a few steps each, round by round, so that they meet the
same machine. Nothing is fitted to the measurements. The plan that `--plan auto` would pick is one of them. With --rows, the
rows are added to that file and the report is about all rows in it: one batch size a run keeps each run short.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
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
    # A dozen captured models are millions of Python objects, through which the collector would go in every plan's steps; in
    # training there is one.
    gc.collect()
    gc.freeze()
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


def compare(target: str, devices: int, batch: int, specs: list[str], rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row for each plan and for auto's: predicted and measured seconds and bytes."""
    probe = load_probe()
    if probe is None:
        probe = probe_machine(say=print)
        save_probe(probe)
    cluster = cluster_of(probe, devices)
    graph, _ = graph_of(target)
    found = search(graph, cluster, batch=batch, precision="fp32", space=Space(executable=True))
    auto = found.best.bound(batch=batch).spec()
    cases = [(spec, batch) for spec in dict.fromkeys([*specs, auto])]
    with Workers(devices, threads=1) as workers:
        by_rank = workers.call(measure, target, cases, rounds, steps, timeout=600)
    rows = []
    for i, (spec, _) in enumerate(cases):
        predicted = estimate(graph, cluster, Plan.parse(spec).bound(batch=batch), batch=batch)
        rows.append(
            {
                "target": Path(target.partition(":")[0]).name + ":" + target.partition(":")[2],
                "devices": devices,
                "batch": batch,
                "plan": spec,
                "auto": spec == auto,
                "seconds": statistics.median(max(r[i]["seconds"][k] for r in by_rank) for k in range(rounds)),
                "predicted_seconds": predicted.step_time_s,
                "bytes": max(r[i]["bytes"] for r in by_rank),
                "predicted_bytes": predicted.peak_memory,
                "rounds": rounds,
                "steps": steps,
                "date": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M}",
            }
        )
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """Errors, and what auto's plan took over the fastest of its run, as Markdown."""
    lines = [
        "| model | devices | plan | batch | predicted ms | measured ms | error | predicted MiB | measured MiB | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["devices"], row["batch"], row["date"]), []).append(row)
        time_error, memory_error = _error(row, "seconds"), _error(row, "bytes")
        lines.append(
            f"| {row['target']} | {row['devices']} | {row['plan']}{' (auto)' if row['auto'] else ''} | {row['batch']} | "
            f"{1e3 * row['predicted_seconds']:.0f} | {1e3 * row['seconds']:.0f} | {100 * time_error:+.0f} % | "
            f"{row['predicted_bytes'] / 2**20:.0f} | {row['bytes'] / 2**20:.0f} | {100 * memory_error:+.0f} % |"
        )
    auto = [
        f"{next(r['seconds'] for r in own if r['auto']) / min(r['seconds'] for r in own):.2f} "
        f"({target}, {devices} devices, batch {batch})"
        for (target, devices, batch, _), own in groups.items()
    ]
    first = rows[0]
    return (
        f"# Predicted and measured on one computer\n\nProcesses of one thread, gloo, {os.cpu_count()} cores, "
        f"{platform.machine()}, {first['date'].partition(' ')[0]}; {first['rounds']} rounds of {first['steps']} steps of "
        "every plan in turn, median of the slowest process. Parameters of the prediction come from `plait hardware probe` "
        f"alone.\n\nMean error: time {_mean(rows, 'seconds'):.1f} %, memory {_mean(rows, 'bytes'):.1f} % "
        f"({len(rows)} plans). Auto's plan over the fastest of its run: {'; '.join(auto)}.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _error(row: dict[str, Any], name: str) -> float:
    return float(row[f"predicted_{name}"] / row[name] - 1)


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return 100 * statistics.fmean(abs(_error(row, name)) for row in rows)


def main() -> None:
    """Predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--plans", nargs="*", default=PLANS)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=Path, default=None)
    parser.add_argument("-o", type=Path, default=None)
    options = parser.parse_args()
    rows = compare(options.target, options.devices, options.batch, options.plans, options.rounds, options.steps)
    if options.rows is not None:
        with options.rows.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    text = report(rows)
    print(text)
    if options.o is not None:
        options.o.parent.mkdir(parents=True, exist_ok=True)
        options.o.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
