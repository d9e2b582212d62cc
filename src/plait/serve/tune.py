"""Settings that serve an artefact fastest on this machine: searched within a time budget, kept as a record, repeated from it.

    best = tune(["exports/gpt/onnxruntime", "exports/gpt/openvino"], seconds=60, output="exports/gpt/tune.json")
    served = load_tuned("exports/gpt/tune.json")          # the very same settings; nothing is measured

What is searched: which of the artefacts (runtimes and precisions), threads, the cores they may use, the batch (for
throughput), OpenMP's waiting, and the runtime's own knobs (`Backend.knobs`). How: successive halving. Each configuration is
a live process; they take turns, a few calls each, so that what else goes on on the machine meets all of them; after each round
the slower half goes. With time left, the winner's neighbours (one setting changed) come next. The default settings are
in every round, so that a winner is a winner beside them.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from plait.errors import ServeError
from plait.serve.manifest import Manifest
from plait.serve.registry import backend_at, backends
from plait.serve.trial import Trial
from plait.serve.tune_record import Configuration, Record, machine

__all__ = ["accurate", "load_tuned", "tune", "tuned"]

_LIVE = 8  # processes at once, at most: each holds a runtime and a model
_START = 3.0  # seconds that a process takes to import and load: a short search has fewer of them
_CALLS = 5  # in a row, so that a runtime's spinning threads do not fall into another one's time
_ROUNDS = 3  # turns before the slower half goes
_MOST = 200  # calls of one configuration: more say no more


@dataclass(frozen=True)
class _Space:
    """The settings to choose from."""

    folders: Mapping[str, Mapping[str, Sequence[Any]]]
    """Artefact -> its runtime's knobs."""
    threads: Sequence[int]
    batches: Sequence[int]
    cores: Sequence[int]
    waits: Sequence[str] = ("", "PASSIVE", "ACTIVE")
    default: Configuration = field(kw_only=True)

    def neighbours(self, one: Configuration) -> list[Configuration]:
        """Every configuration that differs in one setting."""
        from dataclasses import replace

        found = [replace(one, threads=n, cpus=()) for n in self.threads]
        found += [replace(one, cpus=tuple(self.cores[: one.threads])), replace(one, cpus=())]
        found += [replace(one, batch=n) for n in self.batches]
        found += [replace(one, wait=w) for w in self.waits]
        for name, values in self.folders[one.artefact].items():
            found += [replace(one, knobs={**one.knobs, name: value}) for value in values]
        found += [replace(one, artefact=folder, knobs={}) for folder in self.folders]
        return [c for i, c in enumerate(found) if c != one and c not in found[:i]]

    def drawn(self, generator: random.Random) -> Configuration:
        """One at random."""
        folder = generator.choice(list(self.folders))
        threads = generator.choice(list(self.threads))
        return Configuration(
            artefact=folder,
            threads=threads,
            cpus=generator.choice([(), tuple(self.cores[:threads])]),
            batch=generator.choice(list(self.batches)),
            wait=generator.choice(list(self.waits)),
            knobs={name: generator.choice(list(values)) for name, values in self.folders[folder].items()},
        )


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
    if seconds <= 0:
        raise ServeError(f"tune: --tune-seconds {seconds:g} must be more than 0")
    if goal == "latency" and len(sizes) > 1:
        raise ServeError("tune: latency is of one batch size", hint="tune for throughput, or give one --batch")
    space = _space([Path(a) for a in artefacts], sizes, threads)
    search = _Search(space, seconds, random.Random(seed), tell)
    trials = search.run()
    good = [t for t in trials if t["rounds"]]
    if not good:
        raise ServeError(f"tune: no configuration ran: {trials[0]['error']}")
    record = Record.of(
        trials,
        machine=machine(),
        goal=goal,
        seed=seed,
        seconds=seconds,
        identities={folder: _identity(Path(folder)) for folder in space.folders},
    )
    if output is not None:
        record.write(Path(output))
    return record


def load_tuned(record: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None) -> Any:
    """The best artefact of a record, loaded with its settings; nothing is measured.

    `folder`: where the artefact is now, if elsewhere. Cores are set for this whole process; what only the environment can
    say (`Configuration.environment`) is for whoever starts it.

    Raises:
        ServeError: the record or the artefact is broken, or the artefact is another than the one that was tuned.
    """
    from plait.serve.served import load

    found = Record.read(Path(record))
    best = found.best
    place = Path(folder) if folder is not None else Path(best.artefact)
    if found.identities.get(best.artefact) != _identity(place):
        raise ServeError(
            f"tune record {record}: {place} is another artefact than the one that was tuned",
            hint="tune again (--tune), or export as then",
        )
    if best.cpus and hasattr(os, "sched_setaffinity"):
        missing = set(best.cpus) - os.sched_getaffinity(0)
        if missing:
            raise ServeError(f"tune record {record}: core {min(missing)} is not this process's to use")
        os.sched_setaffinity(0, best.cpus)
    return load(place, threads=best.threads, knobs=best.knobs)


def _space(folders: Sequence[Path], sizes: tuple[int, ...], threads: Sequence[int] | None) -> _Space:
    if not folders:
        raise ServeError(
            "tune: no artefact to tune", hint="export first: plait export TARGET --to onnxruntime,openvino"
        )
    known = backends()
    knobs: dict[str, Mapping[str, Sequence[Any]]] = {}
    weights = set()
    for folder in folders:
        manifest = Manifest.read(folder)
        if manifest.backend not in known:
            raise ServeError(f"{folder}: its backend {manifest.backend!r} is not installed here")
        backend = backend_at(known[manifest.backend])
        if backend.status == "prepared" or backend.missing():
            raise ServeError(f"{folder}: {backend.missing() or 'it is prepared only and runs elsewhere'}")
        weights.add(manifest.weights_sha256)
        low, high = next(iter(manifest.entries.values())).dims.get("batch", (1, 2**31))
        for size in sizes:
            if not low <= size <= high:
                raise ServeError(f"{folder}: batch {size} is outside of what it serves, {low} to {high}")
        knobs[str(folder)] = dict(backend.knobs())
    if len(weights) > 1:
        raise ServeError("tune: these artefacts are of different models (other weights)")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    counts = (
        sorted({n for n in (1, 2, 4, 8, 16, 32, 64, len(cores)) if n <= len(cores)})
        if threads is None
        else list(threads)
    )
    if not counts or min(counts) < 1 or max(counts) > len(cores):
        raise ServeError(f"tune: threads {counts} do not fit the {len(cores)} cores of this process")
    first = str(folders[0])
    default = Configuration(artefact=first, threads=max(counts), cpus=(), batch=sizes[0], wait="", knobs={})
    return _Space(knobs, counts, sizes, cores, default=default)


def _identity(folder: Path) -> str:
    """What an artefact is: another export of the same weights for the same runtime is as good."""
    manifest = Manifest.read(folder)
    return f"{manifest.backend} {manifest.precision} {manifest.weights_sha256}"


def tuned(
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    sizes: tuple[int, ...],
    seconds: float,
    goal: Literal["latency", "throughput"],
    least_cosine: float,
    record: str | os.PathLike[str] | None,
    tell: Callable[[str, str], None],
) -> dict[str, Any]:
    """For an export's report: the best settings of its artefacts, searched or from a record; `tune.json` in `folder`.

    A record's artefact is found among the rows by what it is, wherever it lay then.
    """
    candidates = accurate(rows, least_cosine)
    path = folder / "tune.json"
    if record is None:
        batch = sizes[:1] if goal == "latency" else sizes
        found = tune(candidates, seconds=seconds, batch=batch, goal=goal, output=path, tell=lambda t: tell("tune", t))
        place = found.best.artefact
    else:
        found = Record.read(Path(record))
        wanted = found.identities.get(found.best.artefact)
        place = next((str(c) for c in candidates if _identity(c) == wanted), "")
        if not place:
            raise ServeError(
                f"tune record {record}: it is of {wanted}, which is not among what was exported",
                hint="give --to and --precision as then; the weights must be the same",
            )
        if Path(record).resolve() != path.resolve():
            found.write(path)
    return {
        "record": str(path),
        "folder": place,
        "best": asdict(found.best),
        "environment": found.best.environment(),
        "measured": record is None,
        "trials": len(found.trials),
        "best_ms": found.fastest["sample_ms"],
        "default_ms": found.default.get("sample_ms"),
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


class _Search:
    """Successive halving, again and again around the winner, until the time is up."""

    def __init__(self, space: _Space, seconds: float, generator: random.Random, tell: Callable[[str], None]) -> None:
        self._space, self._generator, self._tell = space, generator, tell
        self._end = time.monotonic() + seconds
        self._live = max(2, min(_LIVE, int(seconds / _START)))
        self._seen: dict[Configuration, dict[str, Any]] = {}
        self._round = 0

    def run(self) -> list[dict[str, Any]]:
        """Every trial, in the order in which it was made."""
        group = self._first_group()
        while group:
            winner = self._halved(group)
            if winner is None or time.monotonic() >= self._end:
                break
            fresh = [c for c in self._space.neighbours(winner) if c not in self._seen]
            self._generator.shuffle(fresh)
            # The winner and the default meet the newcomers in the same minutes.
            group = (
                list(dict.fromkeys([self._space.default, winner, *fresh[: max(1, self._live - 2)]])) if fresh else []
            )
        return list(self._seen.values())

    def _first_group(self) -> list[Configuration]:
        from dataclasses import replace

        group = [self._space.default]
        group += [replace(self._space.default, artefact=folder) for folder in self._space.folders]
        for _ in range(20 * self._live):
            if len(dict.fromkeys(group)) >= self._live:
                break
            group.append(self._space.drawn(self._generator))
        return list(dict.fromkeys(group))[: self._live]

    def _halved(self, group: list[Configuration]) -> Configuration | None:
        """The fastest of a group; all of its processes have ended when this returns."""
        self._round += 1
        live: dict[Configuration, Trial] = {}
        try:
            limit = max(60.0, self._end - time.monotonic())
            live.update({configuration: Trial(configuration, limit=limit) for configuration in group})
            for configuration in group:
                entry = {"configuration": asdict(configuration), "rounds": [], "error": ""}
                self._seen.setdefault(configuration, entry)
                if not live[configuration].is_ready():
                    self._ended(configuration, live.pop(configuration))
            while live:
                for _ in range(_ROUNDS):
                    for trial in live.values():
                        trial.measure(_CALLS)
                ranked = sorted(live, key=lambda c: live[c].cost)
                self._tell(
                    f"round {self._round}: {len(live)} left, fastest {1e3 * live[ranked[0]].cost:.3g} ms a sample"
                )
                over = time.monotonic() >= self._end
                keep = 1 if over or len(ranked) <= 2 else (len(ranked) + 1) // 2
                if len(ranked) <= 2 and not over and max(len(t.seconds) for t in live.values()) < _MOST // 2:
                    keep = len(ranked)
                for configuration in ranked[keep:]:
                    self._ended(configuration, live.pop(configuration))
                if keep == 1:
                    return ranked[0]
            return None
        finally:
            for configuration, trial in live.items():
                self._ended(configuration, trial)

    def _ended(self, configuration: Configuration, trial: Trial) -> None:
        trial.close()
        entry = self._seen[configuration]
        entry["error"] = trial.error
        if trial.seconds:
            entry["rounds"].append({"round": self._round, "seconds": [round(s, 9) for s in trial.seconds]})
