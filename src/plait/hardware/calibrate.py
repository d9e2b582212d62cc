"""A cluster's figures corrected by what runs on it measured: one factor for compute, one for communication."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.errors import HardwareError
from plait.schema.cluster import Cluster

__all__ = ["Comparison", "calibrated", "read_runs"]

_FILE = "prediction.json"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds that one run was predicted to take and took, in the parts of `Breakdown`."""

    name: str
    predicted: dict[str, float]
    measured: dict[str, float]

    def ratio(self, names: Sequence[str]) -> float | None:
        """Measured over predicted seconds of the named parts together; None where either is not there."""
        predicted = sum(self.predicted.get(name, 0.0) for name in names)
        measured = sum(self.measured.get(name, 0.0) for name in names)
        return measured / predicted if predicted > 0 and measured > 0 else None

    @property
    def error(self) -> float:
        """Predicted over measured step time, minus one."""
        return self.predicted["step_time_s"] / self.measured["step_time_s"] - 1


def read_runs(folders: Sequence[Path]) -> list[Comparison]:
    """The comparisons that runs left in their directories (`prediction.json`: predicted and measured by quantity).

    Raises:
        HardwareError: a folder has none, or it is malformed.
    """
    found = []
    for folder in folders:
        path = folder / _FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found.append(Comparison(str(folder), _side(data, "predicted"), _side(data, "measured")))
            _ = found[-1].error
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as problem:
            raise HardwareError(
                f"{path}: {type(problem).__name__}: {problem}",
                hint="a directory of `plait train --plan auto` holds its prediction beside its measurement",
            ) from None
    return found


def _side(data: dict[str, dict[str, Any]], side: str) -> dict[str, float]:
    """The predicted or measured values, those that are there on both sides."""
    both = {n: row for n, row in data.items() if row.get("predicted") is not None and row.get("measured") is not None}
    values = {name: float(row[side]) for name, row in both.items()}
    if values["step_time_s"] <= 0:
        raise ValueError(f"step_time_s={values['step_time_s']}")
    return values


def calibrated(cluster: Cluster, runs: Sequence[Comparison]) -> tuple[Cluster, dict[str, float]]:
    """The cluster with its devices' `scale` and its links' bandwidth corrected, and the error before and after.

    The correction is the median over runs of measured over predicted compute (and communication); where a run measured
    no parts, the step time stands for compute.
    """
    compute = [
        r
        for r in (run.ratio(("compute", "recompute", "optimizer")) or run.ratio(("step_time_s",)) for run in runs)
        if r
    ]
    network = [r for r in (run.ratio(("communication_exposed", "communication_hidden")) for run in runs) if r]
    slower = statistics.median(compute) if compute else 1.0
    farther = statistics.median(network) if network else 1.0
    groups = []
    for group in cluster.groups:
        efficiency = dict(group.device.efficiency)
        efficiency["scale"] = efficiency.get("scale", 1.0) / slower
        groups.append(replace(group, device=replace(group.device, efficiency=efficiency)))
    links = [
        replace(link, bandwidth=link.bandwidth / farther, latency=link.latency * farther) for link in cluster.links
    ]
    before = statistics.fmean(abs(run.error) for run in runs)
    after = statistics.fmean(abs(_corrected(run, slower, farther)) for run in runs)
    return replace(cluster, groups=tuple(groups), links=tuple(links)), {
        "runs": float(len(runs)),
        "compute_factor": slower,
        "communication_factor": farther,
        "error_before_pct": 100 * before,
        "error_after_pct": 100 * after,
    }


def _corrected(run: Comparison, slower: float, farther: float) -> float:
    """The run's error had its parts been scaled."""
    shown = run.predicted.get("communication_exposed", 0.0)
    rest = run.predicted["step_time_s"] - shown
    return (rest * slower + shown * farther) / run.measured["step_time_s"] - 1
