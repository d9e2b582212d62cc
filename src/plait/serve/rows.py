"""One backend's row of an export's report: its child, its artefact's folder, its accuracy on the data."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import PlaitError
from plait.serve.backend import Backend
from plait.serve.child import Request
from plait.serve.isolate import run_child
from plait.serve.manifest import Manifest, finished_folder
from plait.serve.registry import backend_at
from plait.serve.subject import Entry

if TYPE_CHECKING:
    from plait.serve.prepare import Prepared
    from plait.serve.source import Source

__all__ = ["Rows", "served_entry"]


class Rows:
    """What is the same for all backends of one export, and a row of its report for each."""

    def __init__(
        self,
        source: Source,
        prepared: Prepared,
        scratch: Path,
        out: Path,
        sizes: tuple[int, ...],
        threads: tuple[int, ...],
        seconds: float,
        limit: float,
        compiled: bool,
        tell: Callable[[str, str], None],
    ) -> None:
        from plait.serve.loss import task_loss

        self._prepared = prepared
        self._scratch = scratch
        self._out = out
        self._sizes, self._threads = sizes, threads
        self._seconds, self._limit, self._compiled = seconds, limit, compiled
        self._tell = tell
        self._loss = task_loss(source)

    def row(self, name: str, place: str, precision: str) -> dict[str, Any]:
        """What became of one backend in one precision; never raises for what happens inside of it."""
        start = {"backend": name, "precision": precision}
        try:
            backend = backend_at(place)
            interpreter = backend.interpreter()
        except PlaitError as problem:
            return {**start, "status": "missing", "error": problem.message, "hint": problem.hint}
        folder = self._out / (name if precision == "fp32" else f"{name}-{precision}")
        try:
            return {**start, **self._made(backend, place, interpreter, precision, folder)}
        except OSError as problem:
            full = problem.errno in (28, 27, 122)  # ENOSPC, EFBIG, EDQUOT
            what = "the disk is full" if full else str(problem.strerror or problem)
            return {**start, "status": "failed", "error": f"{what}: nothing was left in {folder}"}

    def _made(self, backend: Backend, place: str, interpreter: str, precision: str, folder: Path) -> dict[str, Any]:
        begin = time.monotonic()
        values: dict[str, Any] = {}
        try:
            with finished_folder(folder) as aside:
                values = self._child(backend, place, interpreter, precision, aside, "export", self._seconds)
                if values["status"] not in ("ok", "prepared") or not backend.keeps:
                    raise _NothingKeptError
                self._manifest(backend, precision, values).write(aside)
                if values["status"] == "ok":
                    self._measure_memory(backend, place, interpreter, precision, aside, values)
            values["folder"] = str(folder)
        except _NothingKeptError:
            pass
        from plait.serve.loss import accuracy_on_data

        with suppress(FileNotFoundError):
            values["data"] = accuracy_on_data(self._prepared, self._loss, self._scratch)
        values["wall_s"] = time.monotonic() - begin
        return values

    def _child(
        self, backend: Backend, place: str, interpreter: str, precision: str, artefact: Path, task: str, seconds: float
    ) -> dict[str, Any]:
        request = Request(
            backend=place,
            subject=str(self._prepared.subject.folder),
            artefact=str(artefact.resolve()),
            result=str(self._scratch / "result.json"),
            precision=precision,
            batches=self._sizes,
            threads=self._threads,
            seconds=seconds,
            compiled=self._compiled,
            task=task,
        )
        label = backend.name if precision == "fp32" else f"{backend.name} {precision}"
        return run_child(request, interpreter, limit=self._limit, tell=lambda stage: self._tell(label, stage))

    def _manifest(self, backend: Backend, precision: str, values: dict[str, Any]) -> Manifest:
        import plait

        subject = backend.part(self._prepared.subject)
        facts = values.get("facts", {})
        return Manifest(
            backend=backend.name,
            precision=precision,
            entries={name: served_entry(entry, facts) for name, entry in subject.entries.items()},
            source=subject.source,
            weights_sha256=subject.weights_sha256,
            plait=plait.__version__,
            versions=values.get("versions", {}),
            facts=facts,
        )

    def _measure_memory(
        self, backend: Backend, place: str, interpreter: str, precision: str, folder: Path, values: dict[str, Any]
    ) -> None:
        """Peak memory of a process that only loads the artefact, as a server would, and runs its largest sample."""
        found = self._child(backend, place, interpreter, precision, folder, "serve", 0)
        if found["status"] == "ok":
            # Of the whole process, and what of it came with loading and running; the rest is Python and torch.
            values["serve_peak_bytes"] = found["serving_bytes"]
            values["serve_added_bytes"] = found["serving_bytes"] - found["before_bytes"]
        else:
            values["status"], values["error"] = "failed", f"the finished artefact does not load: {found.get('error')}"
            raise _NothingKeptError


class _NothingKeptError(Exception):
    """Ends the folder that is being made without giving it its name."""


def served_entry(entry: Entry, facts: dict[str, Any]) -> Entry:
    """An entry point as its manifest has it: without the subject's files, and no wider than the artefact serves."""
    limits = facts.get("serves") or {}
    dims = {
        name: (max(low, limits[name][0]), min(high, limits[name][1])) if name in limits else (low, high)
        for name, (low, high) in entry.dims.items()
    }
    return replace(entry, dims=dims, program="", samples=(), data=())
