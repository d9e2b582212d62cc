"""A backend's latency beside eager's and torch.compile's, taken in turn in one process."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.baseline import compiled, eager
from plait.serve.measure import interleaved, summary
from plait.serve.subject import Entry, Sample, Subject

if TYPE_CHECKING:
    from plait.serve.child import Report, Request

__all__ = ["full_sample", "time_all"]


def full_sample(entry: Entry, batch: int) -> Sample | None:
    """The sample of a batch size with every other dimension as long as the export's."""
    first = entry.samples[0].sizes
    for sample in entry.samples:
        others = {name: size for name, size in sample.sizes.items() if name != "batch"}
        if sample.sizes.get("batch", batch) == batch and all(first[name] == size for name, size in others.items()):
            return sample
    return None


def time_all(
    backend: Backend, subject: Subject, folder: Path, facts: Mapping[str, Any], request: Request, report: Report
) -> None:
    """Latencies of every entry point for each number of threads and each batch size, into the report's `latency`."""
    import torch

    from plait.serve.attempt import serves

    rows: list[dict[str, Any]] = []
    for name, entry in subject.entries.items():
        plain, _, which = eager(subject, name)
        for threads in request.threads:
            torch.set_num_threads(threads)
            artefact = Artefact(
                folder=folder, entry=entry, precision=request.precision, threads=threads, facts=facts, subject=subject
            )
            runs: dict[str, Runner] = {"eager": plain, "backend": backend.load(artefact)}
            note = ""
            if request.compiled and shutil.which("g++") and backend.name != "compile":
                runs["compile"] = compiled(plain)
            for batch in request.batches:
                sample = full_sample(entry, batch)
                if sample is None or not serves(sample.sizes, facts):
                    continue
                inputs = subject.inputs(sample, name)
                calls = {key: partial(run, inputs) for key, run in runs.items()}
                if "compile" in calls:
                    try:
                        calls["compile"]()
                    except Exception as problem:  # a model that torch.compile refuses is timed without it
                        note = f"torch.compile: {str(problem).strip().splitlines()[0][:200]}"
                        del runs["compile"], calls["compile"]
                times = interleaved(calls, budget=request.seconds)
                row: dict[str, Any] = {
                    "entry": name,
                    "batch": batch,
                    "threads": threads,
                    "baseline": which,
                    "note": note,
                }
                row.update({key: summary(seconds, batch) for key, seconds in times.items()})
                row["ratio"] = row["backend"]["p50_ms"] / row["eager"]["p50_ms"]
                rows.append(row)
                report.set(latency=rows)
