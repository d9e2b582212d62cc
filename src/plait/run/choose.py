"""`--plan auto`: measure this computer if that was not done yet, search, and say what was chosen and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from plait.cost.step import estimate
from plait.errors import PlanError
from plait.plan.search import SearchResult, search
from plait.plan.space import Space
from plait.run.log import say_on_stderr
from plait.run.processes import spawn
from plait.schema import Estimate

__all__ = ["choose", "choose_in_process", "side_by_side"]


def choose(target: str, devices: int, batch: int | None) -> Estimate:
    """The fastest plan that fits `devices` processes of this computer and that plait can run, with its estimate.

    Runs in a process of its own: the caller stays free of torch.

    Raises:
        PlanError: nothing fits.
    """
    found: Estimate = spawn(choose_in_process, devices=1, args=(target, devices, batch), threads=1)[0]
    return found


def choose_in_process(target: str, devices: int, batch: int | None) -> Estimate:
    """As `choose`, in this process."""
    from plait.capture.graphs import graph_of
    from plait.hardware.local import cluster_of
    from plait.hardware.probe import load_probe, probe_machine, save_probe

    probe = load_probe()
    if probe is None:
        say_on_stderr("measuring this computer once (about a minute; kept for the next time)")
        probe = probe_machine(say=say_on_stderr)
        save_probe(probe)
    graph, own = graph_of(target)
    size = batch or own
    cluster = cluster_of(probe, devices)
    result = search(graph, cluster, batch=size, precision="fp32", space=Space(executable=True))
    for line in _told(result):
        say_on_stderr(line)
    chosen = _runnable(result, size)
    # Once more with the first pieces of work of every rank, for `plait report`.
    return estimate(graph, cluster, chosen.plan, size, timeline=80)


def _runnable(result: SearchResult, batch: int) -> Estimate:
    for found in result.plans:
        try:
            return replace(found, plan=found.plan.bound(batch=batch), timeline=())
        except PlanError:
            continue
    raise PlanError(f"plan: none of the plans found can run a batch of {batch}", hint="use a larger --batch")


def _told(result: SearchResult) -> list[str]:
    rows = (f"  {1e3 * p.step_time_s:9.1f} ms  {p.peak_memory / 2**30:6.2f} GiB  {p.plan.spec()}" for p in result.plans)
    return ["plans by predicted time of a step:", *rows]


def side_by_side(predicted: Estimate, measured: dict[str, Any]) -> dict[str, Any]:
    """Prediction beside measurement, with the error of each in per cent."""
    rows: dict[str, Any] = {}
    for name, value in measured.items():
        if isinstance(value, list):
            continue
        expected = _predicted(predicted, name)
        error = None if expected is None or not value else 100 * (expected - value) / value
        rows[name] = {"predicted": expected, "measured": value, "error_pct": error}
    return rows


def _predicted(estimate: Estimate, name: str) -> float | None:
    if name == "peak_memory":
        return estimate.peak_memory
    if name in ("step_time_s", "tokens_per_s"):
        return float(getattr(estimate, name))
    parts = estimate.breakdown
    return float(getattr(parts, name)) if hasattr(parts, name) else None
