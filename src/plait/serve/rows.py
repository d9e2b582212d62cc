"""One backend's row of an export's report: its child, its artefact's folder, its accuracy on the data."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import PlaitError, ServeError
from plait.serve.backend import Backend
from plait.serve.child import Request
from plait.serve.isolate import run_child
from plait.serve.manifest import Manifest
from plait.serve.output_folder import finished_folder
from plait.serve.registry import backend_at
from plait.serve.subject import Entry

if TYPE_CHECKING:
    from plait.serve.prepare import Prepared
    from plait.serve.source import Source

__all__ = ["Rows", "folder_name", "served_entry"]


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

    def row(
        self, name: str, place: str, precision: str, *, variant: str = "", limit: float | None = None
    ) -> dict[str, Any]:
        """What became of one backend in one precision; never raises for what happens inside of it.

        `variant`: one of the backend's, which is not timed here; `limit` in seconds, where it is not the export's own.
        """
        start = {"backend": name, "precision": precision, **({"variant": variant} if variant else {})}
        try:
            backend = backend_at(place)
            backend.variant = variant
            interpreter = backend.interpreter()
        except PlaitError as problem:
            return {**start, "status": "missing", "error": problem.message, "hint": problem.hint}
        folder = self._out / folder_name(name, precision, variant)
        work = _Work(
            backend=backend,
            place=place,
            interpreter=interpreter,
            precision=precision,
            seconds=0.0 if variant else self._seconds,
            limit=self._limit if limit is None else limit,
        )
        try:
            return {**start, **self._made(work, folder)}
        except OSError as problem:
            full = problem.errno in (28, 27, 122)  # ENOSPC, EFBIG, EDQUOT
            what = "the disk is full" if full else str(problem.strerror or problem)
            return {**start, "status": "failed", "error": f"{what}: nothing was left in {folder}"}
        except ServeError as problem:  # something else has taken the folder's place meanwhile
            return {**start, "status": "failed", "error": problem.message, "hint": problem.hint}

    def _made(self, work: _Work, folder: Path) -> dict[str, Any]:
        begin = time.monotonic()
        values: dict[str, Any] = {}
        try:
            with finished_folder(folder) as aside:
                values = self._child(work, aside, "export", work.seconds)
                if values["status"] not in ("ok", "prepared") or not work.backend.keeps:
                    raise _NothingKeptError
                self._manifest(work, values).write(aside)
                if values["status"] == "ok":
                    self._measure_memory(work, aside, values)
            values["folder"] = str(folder)
        except _NothingKeptError:
            pass
        from plait.serve.loss import accuracy_on_data

        with suppress(FileNotFoundError):
            values["data"] = accuracy_on_data(self._prepared, self._loss, self._scratch)
        values["wall_s"] = time.monotonic() - begin
        return values

    def _child(self, work: _Work, artefact: Path, task: str, seconds: float) -> dict[str, Any]:
        request = Request(
            backend=work.place,
            subject=str(self._prepared.subject.folder),
            artefact=str(artefact.resolve()),
            result=str(self._scratch / "result.json"),
            precision=work.precision,
            variant=work.backend.variant,
            batches=self._sizes,
            threads=self._threads,
            seconds=seconds,
            compiled=self._compiled,
            task=task,
        )
        words = (work.backend.name, "" if work.precision == "fp32" else work.precision, work.backend.variant)
        label = " ".join(filter(None, words))
        return run_child(request, work.interpreter, limit=work.limit, tell=lambda stage: self._tell(label, stage))

    def _manifest(self, work: _Work, values: dict[str, Any]) -> Manifest:
        import plait

        subject = work.backend.part(self._prepared.subject)
        facts = values.get("facts", {})
        return Manifest(
            backend=work.backend.name,
            precision=work.precision,
            entries={name: served_entry(entry, facts) for name, entry in subject.entries.items()},
            source=subject.source,
            weights_sha256=subject.weights_sha256,
            plait=plait.__version__,
            versions=values.get("versions", {}),
            facts=facts,
        )

    def _measure_memory(self, work: _Work, folder: Path, values: dict[str, Any]) -> None:
        """Peak memory of a process that only loads the artefact, as a server would, and runs its largest sample."""
        found = self._child(work, folder, "serve", 0)
        if found["status"] == "ok":
            # Of the whole process, and what of it came with loading and running; the rest is Python and torch.
            values["serve_peak_bytes"] = found["serving_bytes"]
            values["serve_added_bytes"] = found["serving_bytes"] - found["before_bytes"]
        else:
            values["status"], values["error"] = "failed", f"the finished artefact does not load: {found.get('error')}"
            raise _NothingKeptError


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What a backend's children have in common."""

    backend: Backend
    place: str
    """`module:class`."""
    interpreter: str
    precision: str
    seconds: float
    """For timing each batch size with each number of threads; 0: not timed."""
    limit: float


class _NothingKeptError(Exception):
    """Ends the folder that is being made without giving it its name."""


def folder_name(name: str, precision: str, variant: str = "") -> str:
    """Of an artefact, in the output folder."""
    return "-".join(filter(None, (name, "" if precision == "fp32" else precision, variant)))


def served_entry(entry: Entry, facts: dict[str, Any]) -> Entry:
    """An entry point as its manifest has it: without the subject's files, and no wider than the artefact serves."""
    limits = facts.get("serves") or {}
    dims = {
        name: (max(low, limits[name][0]), min(high, limits[name][1])) if name in limits else (low, high)
        for name, (low, high) in entry.dims.items()
    }
    return replace(entry, dims=dims, program="", samples=(), data=())
