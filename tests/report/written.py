"""A run directory and a plan file as plait writes them, without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from plait.schema import Plan

PLAN = Plan.parse("dp=2,pp=2,microbatches=2")
PARTS = {"compute": 0.6, "recompute": 0.0, "communication_exposed": 0.1, "communication_hidden": 0.05, "bubble": 0.2,
         "optimizer": 0.1, "other": 0.0}  # fmt: skip
MEMORY = [
    {"parameters": p, "gradients": p, "optimizer": 2 * p, "activations": 1e8, "transient": 1e6, "buffers": 0.0, "overhead": 0.0}
    for p in (1e8, 2e8)
]  # fmt: skip
TIMELINE = [
    {"rank": r, "kind": kind, "stage": r, "microbatch": m, "start": 0.1 * (r + m) + at, "end": 0.1 * (r + m) + at + 0.1}
    for r in (0, 1) for m in (0, 1) for kind, at in (("forward", 0.0), ("backward", 0.5))
]  # fmt: skip
ESTIMATE = {
    "plan": PLAN.to_dict(), "cluster": "4xcpu", "batch": 8, "step_time_s": 1.0, "tokens_per_s": 100.0, "mfu": 0.5,
    "breakdown": PARTS, "memory": MEMORY, "memory_limit": 1e9, "fits": True, "timeline": TIMELINE, "usd_per_step": None,
    "joule_per_step": None, "notes": ["a note"], "lanes": [],
}  # fmt: skip


def write_run(folder: Path, *, whole: bool = True, target: str = "tiny.py:job", lines: int = 20) -> Path:
    """`whole`: with all that `--plan auto` leaves; else the log and what every run begins with."""
    folder.mkdir(parents=True)
    record: dict[str, Any] = {
        "target": target, "cwd": "/home", "plan": PLAN.to_dict(), "began": "2026-11-24T10:00:00+00:00",
        "machine": {"host": "lab", "cores": 4}, "versions": {"plait": "0.1", "torch": "2.13"},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    steps = [
        {"step": i, "loss": 3.0 / i, "samples_per_s": 8.0, "tokens_per_s": 90.0, "time": 0.0}
        for i in range(1, lines + 1)
    ]
    steps.append({"step": lines, "evaluation_loss": 0.5, "time": 0.0})
    (folder / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    if whole:
        measured = {"compute": 0.7, "bubble": 0.3, "optimizer": 0.1, "communication_exposed": 0.15, "step_time_s": 1.25,
                    "tokens_per_s": 80.0, "peak_memory": 7e8, "peak_memory_by_rank": [7e8, 6e8, 5e8, 6e8]}  # fmt: skip
        summary = {"steps": lines, "loss": 0.15, "evaluation_loss": 0.5, "devices": 4, "batch": 8, "parameters": 1000,
                   "seconds": 30.0, "tokens_per_s": 80.0, "measured": measured, "estimate": ESTIMATE}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def write_plan(path: Path, *, target: str = "tiny.py:job") -> Path:
    short = {"spec": "dp=4", "step_time_s": 1.5, "tokens_per_s": 60.0, "peak_memory_gib": 0.5, "usd_per_step": 1e-4}
    estimate = {k: v for k, v in ESTIMATE.items() if k not in ("plan", "memory", "timeline", "memory_limit", "lanes")}
    estimate |= {"spec": PLAN.spec(), "peak_memory_gib": 0.9, "memory_limit_gib": 0.93, "usd_per_step": 2e-3}
    data = {
        "target": target, "cluster": "4xcpu", "plan": PLAN.to_dict(), "estimate": estimate,
        "report": {"memory": MEMORY, "timeline": TIMELINE, "alternatives": [short], "pareto": [short],
                   "explanation": ["binds: arithmetic"], "notes": []},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(json.loads(json.dumps(data))), encoding="utf-8")
    return path
