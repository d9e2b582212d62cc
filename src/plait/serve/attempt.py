"""Exporting with a backend and holding the result against eager; again with sizes closed where open ones do not work.

    attempt    sizes left open       serves
    1          all                   batch 1 to the largest, every length up to the sample's
    2          the batch alone       the sample's length
    3          none                  one sample of that length

The report says what is served, and why not more.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import PlaitError
from plait.serve.backend import Artefact, Backend
from plait.serve.subject import Subject

if TYPE_CHECKING:
    from plait.serve.child import Report

__all__ = ["make", "serves"]


def make(backend: Backend, subject: Subject, folder: Path, precision: str, threads: int, report: Report) -> Subject:
    """Export into `folder` with as many sizes open as work; gives the subject as it was exported. Facts go into the report.

    Raises:
        Exception: what the first attempt met, if none works.
    """
    first: Exception | None = None
    last: Exception | None = None
    for attempt in _attempts(subject):
        try:
            facts = _once(backend, attempt, folder, precision, threads, report)
        except Exception as problem:
            first, last = first or problem, problem
            _empty(folder)
            continue
        if attempt.closed:
            facts["serves"] = {**facts.get("serves", {}), **{name: [n, n] for name, n in attempt.closed.items()}}
            sizes = ", ".join(f"{name} {size}" for name, size in attempt.closed.items())
            reason = " ".join(str(first).split())[:160]
            facts["note"] = "; ".join(filter(None, (f"serves {sizes} only ({reason})", facts.get("note"))))
        report.set(facts=facts)
        return attempt
    assert first is not None
    if last is not first and str(last) != str(first):
        raise first from last  # that a size is open may be all that the first one says
    raise first


def _attempts(subject: Subject) -> Iterator[Subject]:
    yield subject
    if len(subject.entries) > 1:
        return  # prefill and decode share their sizes; one of them alone would be of no use
    entry = next(iter(subject.entries.values()))
    sizes = entry.samples[0].sizes
    lengths = {name: size for name, size in sizes.items() if name != "batch"}
    if lengths and "batch" in sizes:
        yield replace(subject, closed=lengths)
    one = next((s.sizes for s in entry.samples if s.sizes == {**sizes, "batch": 1}), sizes)
    if one:
        yield replace(subject, closed=dict(one))


def _once(
    backend: Backend, subject: Subject, folder: Path, precision: str, threads: int, report: Report
) -> dict[str, Any]:
    is_exact = precision == "fp32"
    closed = {"serves": {name: [size, size] for name, size in subject.closed.items()}} if subject.closed else {}
    if subject.weights == "random" and is_exact and backend.status == "run":
        moved = replace(subject, moved=True)
        report.set(stage="exporting with moved weights")
        facts = {**closed, **backend.export(moved, folder, precision)}
        report.set(stage="checking moved weights")
        parity = check(backend, moved, folder, facts, threads, precision)
        report.set(perturbed=parity)
        _refuse_difference(parity)
        _empty(folder)
    report.set(stage="exporting")
    begin = time.perf_counter()
    facts = {**closed, **backend.export(subject, folder, precision)}
    if backend.variant:
        facts["variant"] = backend.variant
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    report.set(export_s=time.perf_counter() - begin, bytes=size, versions=backend.versions())
    _refuse_size(backend, subject, size, precision)
    if backend.status == "run":
        report.set(stage="checking")
        parity = check(backend, subject, folder, facts, threads, precision)
        report.set(parity=parity)
        _refuse_difference(parity, is_exact=is_exact)
    return facts


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def serves(sizes: Mapping[str, int], facts: Mapping[str, Any]) -> bool:
    """Whether sizes lie in what an artefact said that it takes."""
    limits = facts.get("serves") or {}
    return all(limits[name][0] <= size <= limits[name][1] for name, size in sizes.items() if name in limits)


def check(
    backend: Backend, subject: Subject, folder: Path, facts: Mapping[str, Any], threads: int, precision: str
) -> list[dict[str, Any]]:
    """The difference from eager on every sample that the artefact serves."""
    from plait.serve.accuracy import difference

    found: list[dict[str, Any]] = []
    for name, entry in subject.entries.items():
        run = backend.load(
            Artefact(folder=folder, entry=entry, precision=precision, threads=threads, facts=facts, subject=subject)
        )
        for sample in entry.samples:
            if serves(sample.sizes, facts):
                outputs = run(subject.inputs(sample, name))
                gap = difference([s.name for s in entry.outputs], subject.outputs(sample, name), outputs)
                found.append({"entry": name, "sizes": dict(sample.sizes), **gap.to_dict()})
    return found


def _refuse_difference(parity: list[dict[str, Any]], *, is_exact: bool = True) -> None:
    """A lower precision may be off by much, which the table says; a value that is no number is none of its errors."""
    from plait.serve.accuracy import PARITY

    lost = next((one for one in parity if one["lost"]), None)
    if lost is not None:
        raise PlaitError(
            f"it does not compute what eager does: {lost['worst']} at {lost['sizes'] or 'the exported shape'}: {lost['lost']}"
        )
    wrong = [one for one in parity if is_exact and not one["max_rel"] <= PARITY]
    if wrong:
        worst = max(wrong, key=lambda one: one["max_rel"])
        raise PlaitError(
            f"it does not compute what eager does: relative error {worst['max_rel']:.2g} of {worst['worst']} at "
            f"{worst['sizes'] or 'the exported shape'}, the limit is {PARITY:g}"
        )


def _refuse_size(backend: Backend, subject: Subject, size: int, precision: str) -> None:
    """A much smaller artefact than its weights has lost some (folded away, or not saved)."""
    least = {"fp32": 0.9, "bf16": 0.45, "fp16": 0.45}.get(precision, 0.2)
    if backend.keeps and size < least * subject.parameter_bytes:
        raise PlaitError(
            f"the artefact has {size} bytes for {subject.parameter_bytes} bytes of weights: some are missing"
        )
