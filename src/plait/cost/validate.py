"""Predictions held against a table of published measurements."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from plait.cost.architecture import build_graph
from plait.cost.calibration import Calibration, load_calibration
from plait.cost.case import Case, SkipRow, case_of
from plait.cost.model import Cache
from plait.cost.step import estimate
from plait.cost.table import Row
from plait.errors import PlaitError
from plait.schema.estimate import Estimate
from plait.schema.graph import Graph
from plait.units import GIB, TERA

__all__ = ["Predicted", "Validation", "predict_rows", "validate"]

_TIME_ONLY = "time only"
_CHOICES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """One row with its prediction, or the reason why there is none."""

    row: Row
    skipped: str = ""
    case: Case | None = None
    estimate: Estimate | None = None
    measured_step_time_s: float | None = None
    measured_memory: float | None = None
    """Bytes."""
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float | None:
        """Predicted over measured step time, minus one."""
        if self.estimate is None or self.measured_step_time_s is None:
            return None
        return self.estimate.step_time_s / self.measured_step_time_s - 1

    @property
    def memory_error(self) -> float | None:
        """Predicted over measured peak memory, minus one."""
        if self.estimate is None or self.measured_memory is None:
            return None
        return self.estimate.peak_memory / self.measured_memory - 1

    @property
    def key(self) -> tuple[str, str]:
        """(source, accelerator)."""
        return self.row.group, self.row.text("accelerator")

    @property
    def is_scored(self) -> bool:
        """Whether the row counts with the others for time."""
        return not self.row.text("apart") or self.row.text("apart").startswith(_TIME_ONLY)

    @property
    def is_memory_scored(self) -> bool:
        """Whether the row counts with the others for memory."""
        return not self.row.text("apart")

    @property
    def is_usable(self) -> bool:
        """Whether architecture, batch, degrees and a time are there."""
        row = self.row
        needed = all(row.number(n) for n in ("layers", "hidden", "heads", "seq_len", "global_batch", "n_accelerators"))
        timed = any(row.number(n) for n in ("step_time_s", "tokens_per_s_per_accel", "tflops_per_accel", "mfu_pct"))
        return bool(needed and timed and any(row.number(n) for n in ("dp", "tp", "pp")))

    def to_dict(self) -> dict[str, Any]:
        """The row of `plait validate --json`."""
        row = self.row
        out: dict[str, Any] = {"id": row.id, "source": row.group, "accelerator": row.text("accelerator")}
        if row.text("apart"):
            out["apart"] = row.text("apart")
        if self.estimate is None or self.case is None:
            return {**out, "skipped": self.skipped}
        tokens = self.case.batch * self.case.architecture.seq_len / self.case.plan.devices
        predicted, measured = self.estimate.step_time_s, self.measured_step_time_s
        scale = None if measured is None else predicted / measured
        return {
            **out,
            "spec": self.case.plan.spec() if not self.case.open_recompute else self.estimate.plan.spec(),
            "predicted_step_time_s": predicted,
            "predicted_tokens_per_s_per_accel": tokens / predicted,
            "predicted_mfu": self.estimate.mfu,
            "predicted_peak_memory_gib": self.estimate.peak_memory / GIB,
            "measured_step_time_s": measured,
            "measured_tokens_per_s_per_accel": None if measured is None else tokens / measured,
            "measured_mfu": None if scale is None else self.estimate.mfu * scale,
            "measured_peak_memory_gib": None if self.measured_memory is None else self.measured_memory / GIB,
            "error_pct": None if self.error is None else 100 * self.error,
            "memory_error_pct": None if self.memory_error is None else 100 * self.memory_error,
            "breakdown": self.estimate.breakdown.to_dict(),
            "filled": [*self.case.filled, *self.notes],
        }


def _measured(row: Row, case: Case, graph: Graph, notes: list[str]) -> float | None:
    """Seconds of the measured step: as printed, else from tokens, else from FLOP/s."""
    if (seconds := row.number("step_time_s")) is not None:
        return seconds
    tokens = case.batch * graph.tokens_per_sample / case.plan.devices
    if (rate := row.number("tokens_per_s_per_accel")) is not None:
        return tokens / rate
    flops = 3 * graph.flops * case.batch / graph.batch / case.plan.devices
    device = case.cluster.groups[0].device
    if (tera := row.number("tflops_per_accel")) is not None:
        notes.append("measured time from tflops_per_accel, attention counted in full")
        return flops / (tera * TERA)
    if (mfu := row.number("mfu_pct")) is not None:
        notes.append("measured time from mfu_pct, attention counted in full")
        return flops / (
            mfu / 100 * device.peak("bf16" if case.plan.precision in ("fp8", "fp4") else case.plan.precision)
        )
    return None


def predict_rows(rows: Iterable[Row], calibration: Calibration | None = None) -> list[Predicted]:
    """Every row with its prediction or the reason why there is none."""
    calibration = calibration or load_calibration()
    graphs: dict[Any, tuple[Graph, Cache]] = {}
    return [_predict(row, calibration, graphs) for row in rows]


def _predict(row: Row, calibration: Calibration, graphs: dict[Any, tuple[Graph, Cache]]) -> Predicted:
    try:
        case = case_of(row, calibration)
        if case.architecture not in graphs:
            graphs[case.architecture] = (build_graph(case.architecture), Cache())
        graph, cache = graphs[case.architecture]
        notes: list[str] = []
        measured = _measured(row, case, graph, notes)
        memory = row.number("peak_memory_gib")
        found = predict_case(case, graph, cache, calibration)
        if case.open_recompute:
            notes.append(f"recompute {found.plan.recompute}: the least that fits")
    except SkipRow as reason:
        return Predicted(row=row, skipped=str(reason))
    except PlaitError as problem:
        return Predicted(row=row, skipped=problem.message)
    return Predicted(
        row=row,
        case=case,
        estimate=found,
        measured_step_time_s=measured,
        measured_memory=None if memory is None else memory * GIB,
        notes=tuple(notes),
    )


def predict_case(case: Case, graph: Graph, cache: Cache, calibration: Calibration) -> Estimate:
    """The estimate of a case; where the row does not say what is recomputed, with the least that fits."""
    options = _CHOICES if case.open_recompute else (case.plan.recompute,)
    found: Estimate | None = None
    for choice in options:
        found = estimate(graph, case.cluster, replace(case.plan, recompute=choice), case.batch,
                         software=case.software, calibration=calibration, cache=cache)  # fmt: skip
        if found.fits:
            break
    assert found is not None, "there is at least one choice"
    return found


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """All rows and what they add up to."""

    rows: tuple[Predicted, ...]

    def scored(self) -> dict[tuple[str, str], list[Predicted]]:
        """Predicted rows that count for time, by (source, accelerator)."""
        groups: dict[tuple[str, str], list[Predicted]] = defaultdict(list)
        for item in self.rows:
            if item.is_scored and item.error is not None:
                groups[item.key].append(item)
        return dict(groups)

    def groups(self) -> list[dict[str, Any]]:
        """Figures of each (source, accelerator) group."""
        usable: dict[tuple[str, str], int] = defaultdict(int)
        for item in self.rows:
            usable[item.key] += item.is_scored and item.is_usable
        scored = self.scored()
        memory = self.memory_groups()
        out = []
        for key in sorted({item.key for item in self.rows}):
            items = scored.get(key, [])
            errors = [item.error for item in items if item.error is not None]
            complete = usable[key] == 0 or len([i for i in items if i.is_usable]) >= 0.8 * usable[key]
            factor = _median([1 + e for e in errors])
            worst = sorted(items, key=lambda i: -abs(i.error or 0))[:3]
            found = memory.get(key, [])
            out.append(
                {
                    "source": key[0],
                    "accelerator": key[1],
                    "rows": sum(item.key == key for item in self.rows),
                    "usable": usable[key],
                    "count": len(errors),
                    "median_error_pct": (100 * _median([abs(e) for e in errors]) if complete else 100.0)
                    if errors
                    else None,
                    "bias_pct": 100 * (factor - 1) if errors else None,
                    "shape_error_pct": 100 * _median([abs((1 + e) / factor - 1) for e in errors]) if errors else None,
                    "memory_count": len(found),
                    "memory_error_pct": 100 * _median([abs(e) for e in found]) if found else None,
                    "memory_bias_pct": 100 * _median(found) if found else None,
                    "memory_20_under_pct": 100 * sum(e < -0.2 for e in found) / len(found) if found else None,
                    "worst": [{"id": i.row.id, "error_pct": 100 * (i.error or 0)} for i in worst],
                }
            )
        return out

    def memory_groups(self) -> dict[tuple[str, str], list[float]]:
        """Relative memory errors by (source, accelerator)."""
        groups: dict[tuple[str, str], list[float]] = defaultdict(list)
        for item in self.rows:
            if item.is_memory_scored and item.memory_error is not None:
                groups[item.key].append(item.memory_error)
        return dict(groups)

    def sets(self) -> list[list[Predicted]]:
        """Sets of at least 8 configurations of one model, sequence, batch and cluster."""
        found: dict[tuple[str, ...], list[Predicted]] = defaultdict(list)
        names = ("source", "model_name", "seq_len", "global_batch", "n_accelerators", "accelerator")
        for item in self.rows:
            if item.is_scored and item.error is not None:
                found[tuple(item.row.text(n) or str(item.row.number(n)) for n in names)].append(item)
        return [items for items in found.values() if len(items) >= 8]

    def summary(self) -> dict[str, Any]:
        """The figures that decide, each with its n."""
        groups = [g for g in self.groups() if g["median_error_pct"] is not None]
        with_memory = [g for g in self.groups() if g["memory_error_pct"] is not None]
        sets = self.sets()
        ranks = [_rank_correlation(items) for items in sets]
        losses = [_pick_loss(items) for items in sets]
        under = [e for errors in self.memory_groups().values() for e in errors]

        def mean(values: Sequence[float]) -> float | None:
            return statistics.fmean(values) if values else None

        return {
            "rows": len(self.rows),
            "predicted": sum(item.estimate is not None for item in self.rows),
            "skipped": sum(item.estimate is None for item in self.rows),
            "groups": len(groups),
            "level_error_pct": mean([g["median_error_pct"] for g in groups]),
            "shape_error_pct": mean([g["shape_error_pct"] for g in groups]),
            "memory_groups": len(with_memory),
            "memory_error_pct": mean([g["memory_error_pct"] for g in with_memory]),
            "memory_20_under_pct": 100 * sum(e < -0.2 for e in under) / len(under) if under else None,
            "sets": len(sets),
            "rank_correlation": mean(ranks),
            "pick_loss_pct": None if not losses else 100 * statistics.fmean(losses),
        }


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ties sharing their mean."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for position in range(start, end + 1):
            ranks[order[position]] = (start + end) / 2 + 1
        start = end + 1
    return ranks


def _rank_correlation(items: Sequence[Predicted]) -> float:
    """Spearman's rank correlation of predicted and measured throughput; 0 where all are equal."""
    predicted = _ranks([-(i.estimate.step_time_s if i.estimate else 0) for i in items])
    measured = _ranks([-(i.measured_step_time_s or 0) for i in items])
    try:
        return statistics.correlation(predicted, measured)
    except statistics.StatisticsError:
        return 0.0


def _pick_loss(items: Sequence[Predicted]) -> float:
    """What the configuration predicted fastest loses of the best measured throughput."""
    best = min(i.measured_step_time_s or math.inf for i in items)
    pick = min(items, key=lambda i: i.estimate.step_time_s if i.estimate else math.inf)
    return 1 - best / (pick.measured_step_time_s or math.inf)


def validate(rows: Sequence[Row], calibration: Calibration | None = None) -> Validation:
    """Predicts every row that can be and compares."""
    return Validation(rows=tuple(predict_rows(rows, calibration)))
