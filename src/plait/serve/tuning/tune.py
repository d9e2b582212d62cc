"""Settings that serve an artefact fastest on this machine: searched within a time budget, kept as a record, repeated from it.

    best = tune(["exports/gpt/onnxruntime", "exports/gpt/openvino"], seconds=60, output="exports/gpt/tune.json")
    served = load_tuned("exports/gpt/tune.json")          # the very same settings; nothing is measured

What is searched: which of the artefacts (runtimes, precisions, a compiler's variants), threads, the cores they may use, the
batch (for throughput), OpenMP's waiting where the runtime's threads are OpenMP's, and the runtime's own knobs
(`Backend.knobs`). How: `plait.serve.tuning.search`. What wins: `plait.serve.tuning.record`.
"""

from __future__ import annotations

import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from plait.errors import ServeError
from plait.hardware.placement import place_here
from plait.serve.manifest import Manifest
from plait.serve.registry import backend_at, backends
from plait.serve.tuning.record import Configuration, Record, machine
from plait.serve.tuning.search import Runtime, Search, Space

__all__ = ["check_seconds", "check_threads", "fits", "identity", "load_tuned", "tune"]


def tune(
    artefacts: Sequence[str | os.PathLike[str]],
    *,
    seconds: float = 60.0,
    batch: int | Sequence[int] = 1,
    goal: Literal["latency", "throughput"] = "latency",
    threads: Sequence[int] | None = None,
    output: str | os.PathLike[str] | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> Record:
    """The record of a search over the settings of these artefacts, which are of one model; written to `output`.

    `latency` minimises the median of a call at the one batch size, `throughput` the seconds a sample over the sizes.
    Only precisions that are accurate enough belong among the artefacts: accuracy is not measured here.

    Raises:
        ServeError: no artefact, one that cannot be loaded here, of another model, or a batch that one does not serve.
    """
    sizes = (batch,) if isinstance(batch, int) else tuple(dict.fromkeys(batch))
    check_seconds(seconds)
    if goal == "latency" and len(sizes) > 1:
        raise ServeError("tune: latency is of one batch size", hint="tune for throughput, or give one --batch")
    space = _space([Path(a) for a in artefacts], sizes, threads, tell)
    trials = Search(space, seconds, random.Random(seed), tell).run()
    if not any(t["rounds"] for t in trials):
        raise ServeError(f"tune: no configuration ran: {trials[0]['error']}")
    record = Record.of(
        trials,
        machine=machine(),
        goal=goal,
        seed=seed,
        seconds=seconds,
        identities={folder: identity(Path(folder)) for folder in space.runtimes},
    )
    if output is not None:
        record.write(Path(output))
    return record


def load_tuned(record: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None) -> Any:
    """The best artefact of a record, loaded with its settings; nothing is measured.

    `folder`: where the artefact is; by default the one of its name beside the record, else where it was. Cores are set for this whole process; what only the environment can
    say (`Configuration.environment`) is for whoever starts it. A record of another machine is used with a warning.

    Raises:
        ServeError: the record or the artefact is broken, the artefact is another than the one that was tuned, or this process
            may not use its cores.
    """
    from plait.serve.served import load

    found = Record.read(Path(record))
    best = found.best
    beside = Path(record).parent / Path(best.artefact).name
    place = Path(folder) if folder is not None else beside if beside.is_dir() else Path(best.artefact)
    manifest = Manifest.read(place)
    if found.identities.get(best.artefact) != identity(place):
        raise ServeError(
            f"tune record {record}: {place} is another artefact than the one that was tuned",
            hint="tune again (--tune), or export as then",
        )
    if warning := fits(found, record):
        warnings.warn(warning, stacklevel=2)
    _check_knobs(best, manifest, record)
    if best.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, best.cpus)
    return load(place, threads=best.threads, knobs=best.knobs)


def fits(found: Record, where: str | os.PathLike[str]) -> str:
    """A warning where a record is of another machine, else nothing.

    Raises:
        ServeError: its best needs cores that this process may not use.
    """
    best, cores = found.best, _cores()
    missing = set(best.cpus) - set(cores)
    if missing or best.threads > len(cores):
        what = f"core {min(missing)}" if missing else f"{best.threads} threads"
        then, kind = found.machine.get("cores"), found.machine.get("processor")
        raise ServeError(
            f"tune record {where}: {what} is more than this process may use: {len(cores)} cores ({_spelled(cores)})",
            hint=f"it was measured on {then} cores of {kind}; search again here (--tune), or start the process on them (taskset)",
        )
    here = machine()
    other = [
        f"{n} {found.machine.get(n)}, here {here[n]}" for n in ("processor", "cores") if found.machine.get(n) != here[n]
    ]
    return f"tune record {where}: measured on another machine ({'; '.join(other)}): search again" if other else ""


def _spelled(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores)) if len(cores) < 9 else f"{cores[0]} to {cores[-1]}"


def _check_knobs(best: Configuration, manifest: Manifest, where: str | os.PathLike[str]) -> None:
    """A record comes from a file: only what a tuner may try reaches the runtime."""
    known = backends()
    if manifest.backend not in known:
        raise ServeError(f"tune record {where}: its backend {manifest.backend!r} is not installed here")
    knobs = backend_at(known[manifest.backend]).knobs()
    for name, value in best.knobs.items():
        if name not in knobs or not any(value == v and type(value) is type(v) for v in knobs[name]):
            raise ServeError(f"tune record {where}: {manifest.backend} has no setting {name}={value!r}")


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def check_seconds(seconds: float) -> None:
    """Refuse a budget that is none.

    Raises:
        ServeError: it is not more than 0, or has no end.
    """
    if not 0 < seconds < math.inf:
        raise ServeError(f"tune: --tune-seconds {seconds:g} must be more than 0 and finite", hint="try 60")


def check_threads(threads: Sequence[int]) -> None:
    """Refuse counts that a search cannot try here.

    Raises:
        ServeError: there is none, or one that is more than the cores of this process.
    """
    cores = len(_cores())
    if not threads or min(threads) < 1 or max(threads) > cores:
        listed = ",".join(map(str, threads))
        raise ServeError(
            f"tune: --threads {listed} does not fit the {cores} cores that this process may use",
            hint=f"give counts from 1 to {cores}; more threads than cores only wait for each other",
        )


def _space(
    folders: Sequence[Path], sizes: tuple[int, ...], threads: Sequence[int] | None, tell: Callable[[str], None]
) -> Space:
    if not folders:
        raise ServeError(
            "tune: no artefact to tune", hint="export first: plait export TARGET --to onnxruntime,openvino"
        )
    cores = _cores()
    if threads is not None:
        check_threads(threads)
    runtimes, weights, left = {}, set(), []
    for folder in folders:
        manifest = Manifest.read(folder)
        try:
            runtimes[str(folder)] = _runtime(folder, manifest, sizes)
            weights.add(manifest.weights_sha256)
        except ServeError as problem:
            left.append(problem)
            tell(f"left out: {problem.message}")
    if not runtimes:
        raise left[0]
    if len(weights) > 1:
        raise ServeError("tune: these artefacts are of different models (other weights)")
    counts = sorted(
        {n for n in (1, 2, 4, 8, 16, 32, 64, len(cores)) if n <= len(cores)} if threads is None else set(threads)
    )
    chosen = place_here().threads
    default = Configuration(
        artefact=next(iter(runtimes)),
        threads=chosen if chosen in counts else max(counts),
        cpus=(),
        batch=sizes[0],
        wait="",
        knobs={},
    )
    return Space(runtimes=runtimes, threads=counts, batches=sizes, cores=cores, default=default)


def _runtime(folder: Path, manifest: Manifest, sizes: Sequence[int]) -> Runtime:
    known = backends()
    if manifest.backend not in known:
        raise ServeError(f"{folder}: its backend {manifest.backend!r} is not installed here")
    backend = backend_at(known[manifest.backend])
    interpreter = backend.interpreter()
    # What is installed elsewhere cannot be seen from here; its trial says.
    missing = backend.missing() if interpreter == sys.executable else ""
    if backend.status == "prepared" or missing:
        raise ServeError(f"{folder}: {missing or 'it is prepared only and runs elsewhere'}")
    low, high = _entry(manifest).dims.get("batch", (1, 2**31))
    for size in sizes:
        if not low <= size <= high:
            raise ServeError(f"{folder}: batch {size} is outside of what it serves, {low} to {high}")
    return Runtime(knobs=backend.knobs(), interpreter=interpreter, openmp=backend.openmp)


def _entry(manifest: Manifest) -> Any:
    """What is tuned: the forward, where there is one."""
    return manifest.entries.get("forward") or next(iter(manifest.entries.values()))


def identity(folder: Path) -> str:
    """What an artefact is: another export of the same weights for the same runtime is as good."""
    manifest = Manifest.read(folder)
    variant = manifest.facts.get("variant", "")
    return " ".join(filter(None, (manifest.backend, manifest.precision, str(variant), manifest.weights_sha256)))
