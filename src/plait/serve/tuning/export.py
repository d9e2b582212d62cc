"""Tuning as a part of an export: which of its artefacts may win, a compiler's variants of them, and what the report says."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from plait.errors import ServeError
from plait.serve.manifest import Manifest
from plait.serve.registry import backend_at, backends
from plait.serve.tuning.record import Record
from plait.serve.tuning.tune import fits, identity, tune

if TYPE_CHECKING:
    from plait.serve.rows import Rows

__all__ = ["accurate", "tuned", "variant_rows"]


def variant_rows(
    rows: Sequence[Mapping[str, Any]],
    job: Rows,
    places: Mapping[str, str],
    seconds: float,
    wanted: str | None,
    tell: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows of the other ways to compile what was exported, why others were left out), within `seconds`.

    Each is exported and held against eager like any artefact. One that fails is left out: the plain one is there. `wanted`: only
    the one of that identity, however long it takes.
    """
    made: list[dict[str, Any]] = []
    left: list[str] = []
    end = time.monotonic() + seconds
    for row in rows:
        if row["status"] != "ok" or "folder" not in row:
            continue
        backend = backend_at(places[row["backend"]])
        for variant in backend.variants(row["precision"]):
            name = f"{row['backend']} {variant}"
            limit = None if wanted else end - time.monotonic()
            if wanted and not wanted.startswith(f"{row['backend']} {row['precision']} {variant} "):
                continue
            # It compiles for longer than the plain one did, twice where weights are random.
            if limit is not None and limit < row.get("export_s", 0.0):
                left.append(f"{name}: no time left for it (--tune-seconds)")
                continue
            found = job.row(row["backend"], places[row["backend"]], row["precision"], variant=variant, limit=limit)
            if found["status"] == "ok":
                made.append(found)
            elif limit is not None and time.monotonic() >= end:
                left.append(f"{name}: not made within {limit:.0f} s; raise --tune-seconds")
            else:
                left.append(f"{name}: {found.get('error', found['status'])}")
    for text in left:
        tell(f"left out: {text}")
    return made, left


def tuned(
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    sizes: tuple[int, ...],
    seconds: float,
    goal: Literal["latency", "throughput"],
    least_cosine: float,
    record: str | os.PathLike[str] | None,
    tell: Callable[[str, str], None],
    *,
    threads: Sequence[int] | None = None,
) -> dict[str, Any]:
    """For an export's report: the best settings of its artefacts, searched or from a record; `tune.json` in `folder`.

    `threads`: the counts to choose from; None: all that fit. A record's artefact is found among the rows by what it is, wherever
    it lay then.
    """
    candidates = accurate(rows, least_cosine)
    path, warning = folder / "tune.json", ""
    if record is None:
        batch = sizes[:1] if goal == "latency" else sizes
        found = tune(
            candidates,
            seconds=seconds,
            batch=batch,
            goal=goal,
            threads=threads,
            output=path,
            tell=lambda text: tell("tune", text),
        )
        place = found.best.artefact
    else:
        found = Record.read(Path(record))
        wanted = found.identities.get(found.best.artefact)
        place = next((str(c) for c in candidates if identity(c) == wanted), "")
        if not place:
            raise ServeError(
                f"tune record {record}: it is of {wanted}, which is not among what was exported",
                hint="give --to and --precision as then; the weights must be the same",
            )
        warning = fits(found, record)
        if Path(record).resolve() != path.resolve():
            found.write(path)
    backend = backend_at(backends()[Manifest.read(Path(place)).backend])
    return {
        "record": str(path),
        "folder": place,
        "best": asdict(found.best),
        "environment": found.best.environment(openmp=backend.openmp),
        "interpreter": backend.interpreter(),
        "measured": record is None,
        "warning": warning,
        "trials": len(found.trials),
        "best_ms": found.fastest["sample_ms"],
        "default_ms": found.default.get("sample_ms"),
        "ratio": found.ratio,
        "default": found.default["configuration"],
    }


def accurate(rows: Sequence[Mapping[str, Any]], least_cosine: float) -> list[Path]:
    """The folders of an export's rows that work, and whose outputs are as near to eager's as asked where they are not fp32.

    Raises:
        ServeError: there is none.
    """
    found: list[Path] = []
    left: list[Path] = []
    for row in rows:
        if row.get("status") != "ok" or "folder" not in row:
            continue
        data = row.get("data")
        checks = [
            *row.get("parity", ()),
            *(data if isinstance(data, list) else [data] if isinstance(data, dict) else []),
        ]
        cosine = min(
            (float(c["cosine"]) for c in checks if isinstance(c, dict) and c.get("cosine") is not None), default=1.0
        )
        (found if row["precision"] == "fp32" or cosine >= least_cosine else left).append(Path(row["folder"]))
    if not found:
        why = (
            f"none of {', '.join(p.name for p in left)} has a cosine of {least_cosine:g}"
            if left
            else "no backend worked"
        )
        raise ServeError(f"tune: nothing to tune: {why}", hint="see the report, or lower --tune-accuracy")
    return found
