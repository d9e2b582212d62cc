"""`plait export`: a trained model to the runtimes that people serve with, each proven equal to eager and timed beside it."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from plait.errors import PlaitError, ServeError
from plait.hardware.placement import place_here
from plait.serve.backend import PRECISIONS
from plait.serve.output_folder import check_output, write_whole
from plait.serve.registry import chosen
from plait.serve.rows import Rows, folder_name, served_entry

if TYPE_CHECKING:
    from torch import nn

    from plait.capture.job import Job
    from plait.serve.prepare import Prepared
    from plait.serve.source import Source

__all__ = ["export"]

_DATA_BATCHES = 8  # of the user's data, for the accuracy of a precision


def export(
    model: nn.Module | Job | str | os.PathLike[str],
    to: str | Sequence[str],
    *,
    inputs: Any = None,
    output: str | os.PathLike[str] | None = None,
    precision: str | Sequence[str] = "fp32",
    batch: int | Sequence[int] = (1, 8),
    threads: int | Sequence[int] | None = None,
    data: str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    target: str | None = None,
    seconds: float = 4.0,
    limit: float = 600.0,
    compiled: bool = True,
    tune: float = 0.0,
    tune_goal: Literal["latency", "throughput"] = "latency",
    tune_accuracy: float = 0.99,
    tune_record: str | os.PathLike[str] | None = None,
    scratch: str | os.PathLike[str] | None = None,
    tell: Callable[[str, str], None] = lambda backend, stage: None,
) -> dict[str, Any]:
    """What each backend made of a model: the report that is also in `report.json` of the output folder.

    Args:
        model: a module (with `inputs`), a Job, a TARGET, or the run directory of `plait train`. Left as it was.
        to: names of backends, `onnxruntime,openvino` or a list; `all`.
        inputs: a module's sample inputs, batch first: a tensor, a tuple, or a dict of keyword arguments.
        output: folder for a folder of each backend; default `exports/NAME`, or `exports` in the run directory.
        precision: fp32, bf16, fp16, int8 or int8-weight, or several of them.
        batch: batch sizes to time; an artefact serves from 1 to the largest.
        threads: numbers of threads to time with, and for `tune` to choose from; default: what `plait.hardware.placement` chooses
            for one process of this computer, and for `tune` all counts that fit.
        data: text for an hf: target whose accuracy is measured; by default the job's own data, else its sample batch.
        max_length: positions of the key-value cache of a decoder, which then gets the entry points `prefill` and `decode`, too.
        target: what a run directory trained, where it does not say so itself.
        seconds: for timing each batch size with each number of threads; 0: not timed.
        limit: seconds for each backend before it is stopped.
        compiled: whether torch.compile is timed beside eager.
        tune: seconds to search the fastest settings in, over the artefacts that work (`plait.serve.tuning.tune`), at most half of them
            for compiling other variants of them; 0: not at all.
        tune_goal: `latency` of the first batch size, or `throughput` over all of them.
        tune_accuracy: least cosine of a precision below fp32 that may win.
        tune_record: take the settings from this record of an earlier search; nothing is measured.
        scratch: folder that the captured model is kept in; by default it is made in the place for temporary files and removed.
        tell: called with backend and stage as they begin.

    Raises:
        ServeError, TargetError, CheckpointError, CaptureError: what was asked cannot be done. What happens inside a backend is in
            the report instead.
    """
    places = chosen(to)
    precisions = _words(precision)
    unknown = [word for word in precisions if word not in PRECISIONS]
    if unknown:
        from plait.capture.arguments import nearest

        raise ServeError(
            f"export: no precision {unknown[0]!r}{nearest(unknown[0], PRECISIONS)}",
            hint=f"--precision takes {', '.join(PRECISIONS)}",
        )
    # What servers get on this computer, by its measurement if there is one; OMP_NUM_THREADS wins.
    place = place_here()
    sizes, counts = _numbers(batch, "batch"), _numbers(threads or place.threads, "threads")
    cores = os.cpu_count() or max(counts)
    if threads and max(counts) > cores:
        raise ServeError(
            f"export: --threads {max(counts)}, this computer has {cores} processors", hint=f"give at most {cores}"
        )
    wanted = _tuning_checked(tune, tune_record, counts if threads else None)
    from plait.serve.source import source_of

    tell("", "building the model")
    source = source_of(model, target=target, inputs=inputs)
    out = Path(output) if output is not None else _default_output(model, source.name)
    check_output(out, [folder_name(name, p) for name in places for p in precisions])
    try:
        with _folder(scratch) as folder:
            prepared = _prepared(source, folder, sizes, data, tell)
            decoder = None if max_length is None else _decoder(source, prepared, max_length, max(sizes), tell)
            job = Rows(source, prepared, folder, out, sizes, counts, seconds, limit, compiled, tell)
            rows = [job.row(name, module, p) for name, module in places.items() for p in precisions]
            begin = time.monotonic()
            left: list[str] = []
            if tune or wanted:
                from plait.serve.tuning.export import variant_rows

                made, left = variant_rows(rows, job, places, tune / 2, wanted, lambda text: tell("tune", text))
                rows += made
            tune = max(tune / 2, tune - (time.monotonic() - begin)) if tune else 0.0
    except OSError as problem:
        raise PlaitError(
            f"export: the captured model cannot be written to {scratch or tempfile.gettempdir()}: {problem.strerror or problem}",
            hint="if the disk is full, free some space, or let TMPDIR name a folder that has it",
        ) from None
    report = _report(source, prepared, rows, sizes, counts)
    report["placement"] = {"threads": place.threads, "reason": "as asked for" if threads else place.reason}
    if decoder is not None:
        report["decoder"] = decoder
    if tune or tune_record is not None:
        from plait.serve.tuning.export import tuned

        try:
            asked = counts if threads else None
            report["tuned"] = tuned(rows, out, sizes, tune, tune_goal, tune_accuracy, tune_record, tell, threads=asked)
            report["tuned"]["left_out"] = left
        except ServeError as problem:  # what was exported stays, and is told
            report["tuned"] = {"error": problem.message, "hint": problem.hint}
    if any(row["status"] == "ok" and "folder" in row for row in rows):
        _write_start(out, report)
    _write_report(out, report)
    return report


@contextmanager
def _folder(given: str | os.PathLike[str] | None) -> Iterator[Path]:
    if given is not None:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="plait-export-") as made:
        yield Path(made)


def _words(value: str | Sequence[str]) -> list[str]:
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else list(value)


def _numbers(value: int | Sequence[int], what: str) -> tuple[int, ...]:
    found = (value,) if isinstance(value, int) else tuple(dict.fromkeys(value))
    if not found or min(found) < 1:
        raise ServeError(f"export: --{what} {','.join(map(str, found))} is not a list of whole numbers from 1 on")
    return found


def _tuning_checked(seconds: float, record: str | os.PathLike[str] | None, threads: Sequence[int] | None) -> str | None:
    """What artefact a record is of; broken records and counts that cannot be tried are refused before anything is made."""
    if record is not None:
        from plait.serve.tuning.record import Record

        found = Record.read(Path(record))
        return found.identities[found.best.artefact]
    if seconds:
        from plait.serve.tuning.tune import check_seconds, check_threads

        check_seconds(seconds)
        if threads is not None:
            check_threads(threads)
    return None


def _default_output(model: Any, name: str) -> Path:
    if isinstance(model, str | os.PathLike) and os.path.isdir(model):  # noqa: PTH112 - a target may be longer than a name
        return Path(model) / "exports"
    return Path("exports") / "".join(c if c.isalnum() or c in "=-." else "_" for c in name.rsplit("/", 1)[-1])[:100]


def _prepared(source: Source, scratch: Path, sizes: Sequence[int], data: Any, tell: Any) -> Prepared:
    from plait.serve.prepare import prepare

    folder = scratch / "subject"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    batches = _data_of(source, data, max(sizes))
    return prepare(source, folder, asked=sizes, data=batches, tell=lambda stage: tell("", stage))


def _decoder(source: Source, prepared: Prepared, capacity: int, most: int, tell: Any) -> dict[str, Any]:
    """Add `prefill` and `decode` to the subject; what proves them, or why this model has none."""
    if capacity < 4:
        raise ServeError(f"export: --max-length {capacity} must be at least 4")
    from dataclasses import asdict

    from plait.serve.decoding.decode import add_decoder
    from plait.serve.source import eval_mode

    tell("", "deriving prefill and decode")
    try:
        with eval_mode(source.module):
            prepared.subject, proof = add_decoder(
                prepared.subject,
                source.module,
                source.serving_job.batch[0],
                capacity=capacity,
                most=max(2, most),
                random=source.random,
            )
    except ServeError as problem:
        return {"ok": False, "capacity": capacity, "error": problem.message, "hint": problem.hint}
    return {"ok": True, "capacity": capacity, **asdict(proof)}


def _data_of(source: Source, path: Any, batch: int) -> list[tuple[Any, Any]]:
    """Batches of the user's data: of `path`, the job's own held-out or training data, or its sample batch."""
    from plait.run.data import Batches, text_samples

    job = source.job
    text = getattr(job, "text", None)
    if path is not None:
        if text is None:
            raise ServeError(
                f"export: --data {path} is for hf: targets that read text; this one brings its own data",
                hint="give the Job data=, or leave --data away",
            )
        found: Any = text_samples(text, Path(path))
    else:
        found = job.evaluate if job.evaluate is not None else job.data
    if found is None:
        return [job.batch]
    stream = Batches(found, batch=batch, seed=0, shuffle=False)
    return [(b.inputs, b.targets) for b in islice(stream.one_epoch(), _DATA_BATCHES)]


def _report(
    source: Source, prepared: Prepared, rows: list[dict[str, Any]], sizes: Sequence[int], threads: Sequence[int]
) -> dict[str, Any]:
    import plait
    from plait.serve.best import best_rows

    subject = prepared.subject
    return {
        "model": subject.name,
        "source": source.text,
        "weights": subject.weights,
        "weights_sha256": subject.weights_sha256,
        "parameter_bytes": subject.parameter_bytes,
        "plait": plait.__version__,
        "batches": list(sizes),
        "threads": list(threads),
        "entries": {name: served_entry(entry, {}).to_dict() for name, entry in subject.entries.items()},
        "rows": rows,
        "best": best_rows(rows),
    }


def _write_start(out: Path, report: dict[str, Any]) -> None:
    from plait.serve.start_file import NAME, start_file

    tuned = report.get("tuned")
    text = start_file(report["model"], out, report["rows"], tuned if tuned and "error" not in tuned else None)
    try:
        write_whole(out / NAME, text)
        report["placement"]["start_file"] = str(out / NAME)
    except OSError as problem:
        report["report_error"] = f"{NAME} was not written: {problem.strerror}"


def _write_report(out: Path, report: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "report.json", json.dumps(_sayable(report), indent=1, allow_nan=False))
    except OSError as problem:
        report["report_error"] = f"report.json was not written: {problem.strerror}"
    if shutil.disk_usage(out if out.exists() else Path.cwd()).free == 0:
        report.setdefault("report_error", "the disk is full")


def _sayable(value: Any) -> Any:
    """The value with null for what JSON has no number for: the error of a runtime that gave something else altogether."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _sayable(item) for key, item in value.items()}
    return [_sayable(item) for item in value] if isinstance(value, list | tuple) else value
