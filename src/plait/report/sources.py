"""What a run directory or a plan file has to report, read as untrusted text: whatever is missing is left out.

run.json         target, plan, machine, versions       written when the run began
log.jsonl        a line for each step                  while it went
summary.json     measurement, estimate                 when it was done
prediction.json  prediction beside measurement         when the plan was searched for
plan.yaml        plan, estimate, report                of `plait plan -o`
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.errors import PlanError, RequestError
from plait.schema import Plan
from plait.schema.estimate import Breakdown, MemoryParts

__all__ = ["PARTS", "Report", "Work", "read_report"]

PARTS = tuple(name for name in Breakdown.__dataclass_fields__ if name != "communication_hidden")
"""Parts of a step that add up to it."""
_LARGEST = 256 << 20  # bytes; the log of a million steps has 150 MB


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work on the pipeline's timeline, seconds."""

    rank: int
    kind: str
    microbatch: int
    start: float
    end: float


@dataclass(kw_only=True)
class Report:
    """Everything that may be shown; empty where nothing is known."""

    title: str
    kind: str
    """`run` or `plan`."""
    facts: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    speeds: list[tuple[int, float]] = field(default_factory=list)
    """(step, tokens per second; samples where a sample has no tokens)."""
    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    memory: list[dict[str, float]] = field(default_factory=list)
    """Predicted bytes by part, for each pipeline rank."""
    memory_measured: list[float] = field(default_factory=list)
    """Bytes in tensors, for each rank."""
    memory_limit: float | None = None
    timeline: list[Work] = field(default_factory=list)
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    pareto: list[dict[str, Any]] = field(default_factory=list)
    verified: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_report(path: Path) -> Report:
    """The report of a run directory or of a plan file.

    Raises:
        RequestError: it is neither, or what it needs to have is broken.
    """
    if path.is_dir():
        return _run(path)
    if not path.is_file():
        raise RequestError(
            f"report: {path}: no such run directory or plan file",
            hint="pass the --run-dir of `plait train`, or the file that `plait plan -o` wrote",
        )
    return _plan_file(path)


# -- a run


def _run(folder: Path) -> Report:
    log, record, summary = folder / "log.jsonl", _json(folder / "run.json"), _json(folder / "summary.json")
    if not log.is_file():
        raise RequestError(
            f"report: {folder} is not a run directory: it has no log.jsonl",
            hint="pass the --run-dir of `plait train` (by default runs/NAME-DATE), or a plan file",
        )
    report = Report(title=folder.resolve().name, kind="run")
    _read_log(log, report)
    prediction = _json(folder / "prediction.json")
    for name, row in prediction.items():
        if isinstance(row, dict):
            _put(report.predicted, name, row.get("predicted"))
            _put(report.measured, name, row.get("measured"))
    measured = _mapping(summary.get("measured"))
    for name, value in measured.items():
        _put(report.measured, name, value)
    report.memory_measured = _numbers(measured.get("peak_memory_by_rank"))
    estimate = _mapping(summary.get("estimate"))
    _read_estimate(estimate, report)
    report.plan = _plan(record.get("plan")) or _plan(estimate.get("plan"))
    target = record.get("target")
    facts = {
        "target": target,
        "plan": report.plan.spec() if report.plan else summary.get("plan"),
        **{name: summary.get(name) for name in ("devices", "batch", "parameters", "steps", "loss", "evaluation_loss")},
        **{name: summary.get(name) for name in ("seconds", "tokens_per_s", "samples_per_s")},
        "began": record.get("began"),
    }
    report.facts = _finite(facts)
    if not summary:
        report.notes.append("the run has not ended, or was stopped: it left no summary")
        report.facts["steps"] = report.losses[-1][0] if report.losses else None
        report.facts["loss"] = report.losses[-1][1] if report.losses else None
    report.machine = {**_mapping(record.get("machine")), **_mapping(record.get("versions"))}
    if isinstance(target, str) and report.plan is not None:
        report.verified = _certificate(folder, target, report.plan)
    return report


def _read_log(path: Path, report: Report) -> None:
    """A step that was done twice, before and after a restart, counts as it was done last."""
    losses: dict[int, float] = {}
    speeds: dict[int, float] = {}
    evaluations: dict[int, float] = {}
    broken = total = 0
    for line in _text(path).splitlines():
        total += 1
        try:
            entry = json.loads(line)
            step = entry["step"]
            if isinstance(step, bool) or not isinstance(step, int):
                raise TypeError(step)
        except (ValueError, KeyError, TypeError, RecursionError):
            broken += 1
            continue
        _put(losses, step, entry.get("loss"), least=-math.inf)
        _put(speeds, step, entry.get("tokens_per_s") or entry.get("samples_per_s"))
        _put(evaluations, step, entry.get("evaluation_loss"), least=-math.inf)
        if "loss" in entry and step not in losses:
            report.notes.append(f"the loss of step {step} is not a finite number")
    if total and broken == total:
        raise RequestError(f"report: {path}: no line of it is a step of a run", hint="is it plait's own log?")
    if broken:
        report.notes.append(f"{broken} of {total} lines of the log cannot be read and are left out")
    del report.notes[6:]
    report.losses, report.speeds, report.evaluations = (sorted(d.items()) for d in (losses, speeds, evaluations))


def _certificate(folder: Path, target: str, plan: Plan) -> dict[str, Any]:
    """What `plait verify` last said of this target under this plan (however many microbatches)."""

    def same(other: Plan | None) -> bool:
        return other is not None and {**other.to_dict(), "microbatches": 0} == {**plan.to_dict(), "microbatches": 0}

    found = []
    for place in (folder / "certificates", folder.resolve().parent / "certificates", Path("runs/certificates")):
        for path in sorted(place.glob("*.json"))[:1000]:
            record = _json(path)
            if record.get("model") == target and same(_plan(record.get("plan"))):
                found.append(record)
    return max(found, key=lambda record: str(record.get("date", "")), default={})


# -- a plan


def _plan_file(path: Path) -> Report:
    import yaml

    loaded = Plan.load(path)
    data = _mapping(yaml.safe_load(_text(path)))
    more, estimate = _mapping(data.get("report")), _mapping(data.get("estimate"))
    target = data.get("target")
    title = target.partition("?")[0].rpartition("/")[2] if isinstance(target, str) else ""
    report = Report(title=title or path.name, kind="plan", plan=loaded)
    _read_estimate({**estimate, "memory": more.get("memory"), "timeline": more.get("timeline")}, report)
    report.alternatives = _plans([estimate, *_list(more.get("alternatives"))])
    report.pareto = _plans(_list(more.get("pareto")))
    facts = {
        "target": target,
        "cluster": data.get("cluster"),
        "plan": loaded.spec(),
        "devices": loaded.devices,
        **{n: estimate.get(n) for n in ("batch", "step_time_s", "tokens_per_s", "mfu", "peak_memory_gib", "fits")},
        "usd_per_step": estimate.get("usd_per_step"),
    }
    report.facts = _finite(facts)
    report.notes += [str(line) for line in (*_list(more.get("explanation")), *_list(estimate.get("notes")))]
    if not estimate:
        report.notes.append("the file holds a plan alone: `plait plan -o` writes its estimate beside it")
    return report


def _plans(rows: list[Any]) -> list[dict[str, Any]]:
    """Those with a name, a time and a size."""
    found = []
    for row in map(_mapping, rows):
        numbers: dict[str, float] = {}
        for name in ("step_time_s", "peak_memory_gib", "tokens_per_s", "usd_per_step"):
            _put(numbers, name, row.get(name))
        if isinstance(row.get("spec"), str) and {"step_time_s", "peak_memory_gib"} <= numbers.keys():
            found.append({"spec": row["spec"], **numbers})
    return found


def _read_estimate(data: Mapping[str, Any], report: Report) -> None:
    """Both `Estimate.to_dict()` and `Estimate.summary()`."""
    for name in ("step_time_s", "tokens_per_s"):
        _put(report.predicted, name, data.get(name))
    for name, value in _mapping(data.get("breakdown")).items():
        _put(report.predicted, name, value)
    kinds = tuple(MemoryParts.__dataclass_fields__)
    for row in _list(data.get("memory")):
        parts: dict[str, float] = {}
        for name in kinds:
            _put(parts, name, _mapping(row).get(name))
        report.memory.append(parts)
    if not report.memory and (parts_gib := _mapping(data.get("memory_parts_gib"))):
        report.memory.append({n: v * 2**30 for n in kinds if (v := _number(parts_gib.get(n))) is not None})
    limit, limit_gib = _number(data.get("memory_limit")), _number(data.get("memory_limit_gib"))
    report.memory_limit = limit if limit_gib is None else limit_gib * 2**30
    for row in _list(data.get("timeline")):
        span = _mapping(row)
        start, end = _number(span.get("start")), _number(span.get("end"))
        rank, microbatch = span.get("rank"), span.get("microbatch")
        if start is None or end is None or not 0 <= start < end or not isinstance(rank, int) or not 0 <= rank < 4096:
            continue
        number = microbatch if isinstance(microbatch, int) else 0
        report.timeline.append(Work(rank, str(span.get("kind", ""))[:20], number, start, end))
    for line in _list(data.get("notes")):
        if report.kind == "run":
            report.notes.append(str(line))


# -- untrusted values


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise RequestError(f"report: {path} has {path.stat().st_size >> 20} MiB, more than {_LARGEST >> 20}")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as problem:
        raise RequestError(f"report: {path}: {problem.strerror}") from None


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; nothing where there is no such file.

    Raises:
        RequestError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as problem:
        raise RequestError(
            f"report: {path}: {problem}", hint="it is not what plait wrote; delete it to do without"
        ) from None
    if not isinstance(found, dict):
        raise RequestError(
            f"report: {path} holds no JSON object", hint="it is not what plait wrote; delete it to do without"
        )
    return found


def _plan(value: Any) -> Plan | None:
    try:
        return Plan.from_dict(value) if isinstance(value, dict) else None
    except (ValueError, TypeError, PlanError):
        return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _numbers(value: Any) -> list[float]:
    return [n for item in _list(value) if (n := _number(item)) is not None and n >= 0]


def _put(where: dict[Any, float], name: Any, value: Any, *, least: float = 0.0) -> None:
    """Keep a finite number under `name`: times, sizes and rates are never below 0."""
    if (number := _number(value)) is not None and number >= least:
        where[name] = number


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    """Without numbers that are none, and what a page has no words for."""
    return {
        name: value for name, value in facts.items() if isinstance(value, bool | str) or (_number(value) is not None)
    }
