"""A cluster's figures corrected by what runs on it measured: one factor for compute, one for communication.

    step = C / scale + X / node + rest

C is what runs at the device's rates (forward, backward, bubble, optimizer), X the exposed communication, both as predicted
with factors of 1; `scale` and `node` are the cluster's parameters of these names (`plait.cost.calibration`). They are set so
that the squares of the logarithm of predicted over measured step time are least. A run tells only the sum, so both are
drawn to one another where runs of one kind cannot tell them apart.

Factors are absolute: a run says which its prediction was made with, so that the same runs give the same figures however
often they are used. Known error: one factor holds for all operators and one for all collectives.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.errors import HardwareError
from plait.schema.cluster import Cluster

__all__ = ["CLUSTER_FILE", "Comparison", "calibrated", "read_runs"]

CLUSTER_FILE = "cluster.json"
"""In a run directory: the cluster that the prediction was made for."""
_FILE = "prediction.json"
_DEVICE_PARTS = ("compute", "recompute", "bubble", "optimizer")
_TOGETHER = 0.05  # weight of (log scale - log node)^2 against one run: decides only where the runs do not
_LARGEST = 20.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds that one run was predicted to take and took, in the parts of `Breakdown`."""

    name: str
    predicted: dict[str, float]
    measured: dict[str, float]
    cluster: Cluster

    @property
    def parts(self) -> tuple[float, float, float]:
        """(C, X, rest) of the module's formula."""
        total, shown = self.predicted["step_time_s"], self.predicted.get("communication_exposed", 0.0)
        device = sum(self.predicted.get(name, 0.0) for name in _DEVICE_PARTS)
        if not 0 < device + shown <= total * 1.001:  # a prediction without parts: all of it is compute
            device, shown = total, 0.0
        scale, node = _factors(self.cluster)
        return device * scale, shown * node, max(0.0, total - device - shown)

    def error(self, scale: float, node: float) -> float:
        """Logarithm of predicted over measured step time with these factors."""
        device, shown, rest = self.parts
        return math.log((device / scale + shown / node + rest) / self.measured["step_time_s"])


def read_runs(folders: Sequence[Path]) -> list[Comparison]:
    """The comparisons that runs left in their directories: `prediction.json`, and `cluster.json` that it was made for.

    Raises:
        HardwareError: a folder lacks one of them, or it is malformed.
    """
    found = []
    for folder in folders:
        path = folder / _FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            sides = _side(data, "predicted"), _side(data, "measured")
            path = folder / CLUSTER_FILE
            found.append(Comparison(str(folder), *sides, Cluster.from_json(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise HardwareError(
                f"{path}: {type(problem).__name__}: {problem}",
                hint="a directory of `plait train --plan auto` holds its prediction beside its measurement",
            ) from None
        except HardwareError as problem:
            raise HardwareError(f"{path}: {problem.message}", hint=problem.hint) from None
    return found


def _side(data: dict[str, dict[str, Any]], side: str) -> dict[str, float]:
    """The predicted or measured values, those that are there on both sides."""
    both = {n: row for n, row in data.items() if row.get("predicted") is not None and row.get("measured") is not None}
    values = {name: float(row[side]) for name, row in both.items()}
    if wrong := [name for name, value in values.items() if not math.isfinite(value) or value < 0]:
        raise ValueError(f"{side} {wrong[0]}={values[wrong[0]]}")
    if values["step_time_s"] <= 0:
        raise ValueError(f"{side} step_time_s={values['step_time_s']}")
    return values


def calibrated(cluster: Cluster, runs: Sequence[Comparison]) -> tuple[Cluster, dict[str, float]]:
    """The cluster with `scale` and `node` set by the runs, and the mean error of these before and after.

    Raises:
        HardwareError: a run is another cluster's, or took more than twenty times longer or shorter than predicted.
    """
    for run in runs:
        _check_same(cluster, run)
    scale, node = _fit(runs)
    for run in runs:
        if not 1 / _LARGEST < math.exp(run.error(*_factors(run.cluster))) < _LARGEST:
            raise HardwareError(
                f"{run.name}: predicted {run.predicted['step_time_s']:.3g} s, measured {run.measured['step_time_s']:.3g} s",
                hint="such a difference is no calibration: run `plait hardware probe` again, on an idle computer",
            )
    before, after = (_mean_error(runs, *factors) for factors in (_factors(cluster), (scale, node)))
    groups = tuple(
        replace(
            group, device=replace(group.device, efficiency={**group.device.efficiency, "scale": scale, "node": node})
        )
        for group in cluster.groups
    )
    return replace(cluster, groups=groups), {
        "runs": float(len(runs)),
        "scale": scale,
        "node": node,
        "error_before_pct": before,
        "error_after_pct": after,
    }


def _check_same(cluster: Cluster, run: Comparison) -> None:
    theirs, ours = ({group.device.name for group in of.groups} for of in (run.cluster, cluster))
    if theirs != ours:
        raise HardwareError(
            f"{run.name}: this run was on {', '.join(sorted(theirs))}, the cluster has {', '.join(sorted(ours))}",
            hint="calibrate a cluster by runs on its own devices",
        )


def _factors(cluster: Cluster) -> tuple[float, float]:
    """(scale, node) as the cluster's devices state them."""
    efficiency = cluster.groups[0].device.efficiency
    return efficiency.get("scale", 1.0), efficiency.get("node", 1.0)


def _mean_error(runs: Sequence[Comparison], scale: float, node: float) -> float:
    """Mean of |predicted / measured - 1| in per cent."""
    return 100 * statistics.fmean(abs(math.expm1(run.error(scale, node))) for run in runs)


def _fit(runs: Sequence[Comparison]) -> tuple[float, float]:
    """(scale, node) of least squares, by Gauss and Newton in their logarithms."""
    u = v = 0.0
    for _ in range(50):
        # gradient and matrix of sum(error^2) + _TOGETHER (u - v)^2
        gu, gv = _TOGETHER * (u - v), _TOGETHER * (v - u)
        uu, uv, vv = _TOGETHER + 1e-9, -_TOGETHER, _TOGETHER + 1e-9
        for run in runs:
            device, shown, rest = run.parts
            error = run.error(math.exp(u), math.exp(v))
            whole = device / math.exp(u) + shown / math.exp(v) + rest
            du, dv = -device / math.exp(u) / whole, -shown / math.exp(v) / whole
            gu, gv = gu + error * du, gv + error * dv
            uu, uv, vv = uu + du * du, uv + du * dv, vv + dv * dv
        determinant = uu * vv - uv * uv
        step_u, step_v = (gu * vv - gv * uv) / determinant, (gv * uu - gu * uv) / determinant
        largest = max(1.0, abs(step_u), abs(step_v))
        u, v = u - step_u / largest, v - step_v / largest
        bound = math.log(_LARGEST)
        u, v = min(bound, max(-bound, u)), min(bound, max(-bound, v))
        if max(abs(step_u), abs(step_v)) < 1e-12:
            break
    return math.exp(u), math.exp(v)
