"""tune.json: every trial with its measurements, the machine, and the configuration that they make the best.

The last round is the confirmation: the default settings (the first trial) and what the search found, in fresh processes that
take turns; `sets` are the turns of each set of processes. Best is what was faster there by more than chance: by 2 % in the
median of all turns, in three of four of them, and in every set. Where nothing was, the default settings are the best.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from plait.errors import ServeError

__all__ = ["Configuration", "Record", "machine"]

_FORMAT = "plait tuning 2"
_WAITS = ("", "PASSIVE", "ACTIVE")
_WORTH = 0.98  # of the default's time, at most: two runs of the same thing differ by up to 2 % here
_SURE = 0.75  # of the turns, at least, in which the winner was the faster one


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Everything that a tuned artefact is run with."""

    artefact: str
    """Its folder."""
    threads: int
    cpus: tuple[int, ...]
    """Cores that the process may use; empty: all."""
    batch: int
    wait: str
    """OMP_WAIT_POLICY: whether idle threads spin (ACTIVE) or sleep (PASSIVE); empty: as OpenMP has it."""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """The runtime's own settings; what is left out has its default."""

    def __hash__(self) -> int:
        return hash(
            (self.artefact, self.threads, self.cpus, self.batch, self.wait, json.dumps(self.knobs, sort_keys=True))
        )

    def environment(self, *, openmp: bool) -> dict[str, str]:
        """Variables that have to be there before the process starts; `openmp`: the runtime's threads are OpenMP's."""
        found = {"OMP_NUM_THREADS": str(self.threads)}
        if self.wait:
            found["OMP_WAIT_POLICY"] = self.wait
        # Elsewhere a runtime's own threads would inherit the one core that OpenMP keeps the main thread to.
        if self.cpus and openmp:
            found["GOMP_CPU_AFFINITY"] = " ".join(map(str, self.cpus))
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What `asdict` gave, checked.

        Raises:
            ValueError, TypeError, KeyError: it is malformed.
        """
        if set(data) != {"artefact", "threads", "cpus", "batch", "wait", "knobs"}:
            raise ValueError(f"a configuration has {sorted(data)}")
        threads, batch, cpus, wait, knobs = data["threads"], data["batch"], data["cpus"], data["wait"], data["knobs"]
        whole = [threads, batch, *cpus]
        if (
            not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in whole)
            or threads < 1
            or batch < 1
        ):
            raise ValueError(f"threads {threads}, batch {batch} and cpus {cpus} must be whole numbers")
        if wait not in _WAITS or not isinstance(knobs, dict) or not isinstance(data["artefact"], str):
            raise ValueError("wait, knobs or artefact")
        if not all(isinstance(v, str | int | float | bool) for v in knobs.values()):
            raise ValueError("a knob's value is no text, number or truth value")
        return cls(
            artefact=data["artefact"], threads=threads, cpus=tuple(cpus), batch=batch, wait=wait, knobs=dict(knobs)
        )


@dataclass(frozen=True)
class Record:
    """A finished search."""

    goal: str
    seed: int
    seconds: float
    machine: Mapping[str, Any]
    identities: Mapping[str, str]
    """Artefact -> its runtime, precision and the SHA-256 of its weights."""
    trials: Sequence[Mapping[str, Any]]
    """Each with configuration, calls, p50, p90 and p10 in milliseconds a call, p50 a sample, its rounds, and an error or ''.
    The first is of the default settings."""
    best: Configuration

    @classmethod
    def of(
        cls,
        raw: Sequence[Mapping[str, Any]],
        *,
        machine: Mapping[str, Any],
        goal: str,
        seed: int,
        seconds: float,
        identities: Mapping[str, str],
    ) -> Self:
        """From a search's trials; the best is decided by their measurements alone."""
        trials = [_summed(trial) for trial in raw]
        return cls(goal, seed, seconds, dict(machine), dict(identities), trials, _best(trials))

    @property
    def fastest(self) -> Mapping[str, Any]:
        """The best configuration's trial."""
        return next(t for t in self.trials if Configuration.from_dict(t["configuration"]) == self.best)

    @property
    def default(self) -> Mapping[str, Any]:
        """The trial of the default settings."""
        return self.trials[0]

    @property
    def ratio(self) -> float:
        """The best one's time a sample over the default's, the median over the turns of the confirmation; 1: it is the default."""
        return _ratios(self.fastest, self.default)[0]

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        data = {"format": _FORMAT, **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            aside.write_text(json.dumps(data, indent=1), encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in a file.

        Raises:
            ServeError: there is none, it is malformed, or its best is not what its measurements say.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            form = data.pop("format")
            if form != _FORMAT:
                raise ValueError(f"not of the format {_FORMAT!r}, but {form!r}")
            best = Configuration.from_dict(data.pop("best"))
            trials = [_summed(trial) for trial in data.pop("trials")]
            found = cls(**data, trials=trials, best=best)
            found._check()
            decided = _best(trials)
        except FileNotFoundError:
            raise ServeError(f"tune record {path}: no such file", hint="`--tune` writes one: tune.json") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as problem:
            raise ServeError(
                f"tune record {path}: it is malformed: {problem}", hint="search again (--tune): it writes another"
            ) from None
        if decided != best:
            raise ServeError(
                f"tune record {path}: its best is not the one that its measurements say; it was changed",
                hint="search again (--tune), or give the record as it was written",
            )
        return found

    def _check(self) -> None:
        texts = [*self.identities.items(), (self.goal, "")]
        if not all(isinstance(word, str) for pair in texts for word in pair) or not isinstance(self.machine, dict):
            raise ValueError("its goal, machine or identities")
        if self.best.artefact not in self.identities:
            raise ValueError("its best artefact is none of its identities")


def _summed(trial: Mapping[str, Any]) -> dict[str, Any]:
    """A trial with its figures; those of the last round, in which it met the others that were left."""
    configuration = Configuration.from_dict(trial["configuration"])
    rounds: list[dict[str, Any]] = [
        {
            "round": int(r["round"]),
            "calls_a_turn": int(r["calls_a_turn"]),
            "sets": [int(n) for n in r["sets"]],
            "seconds": [float(s) for s in r["seconds"]],
        }
        for r in trial["rounds"]
    ]
    for one in rounds:
        if one["calls_a_turn"] < 1 or not one["seconds"] or not all(0 < s < math.inf for s in one["seconds"]):
            raise ValueError(f"round {one['round']} of a trial has no positive times")
        if any(n < 1 for n in one["sets"]):
            raise ValueError(f"round {one['round']} of a trial has an empty set")
    error = str(trial["error"])
    found: dict[str, Any] = {"configuration": asdict(configuration), "calls": sum(len(r["seconds"]) for r in rounds)}
    if rounds:
        last = rounds[-1]
        ordered = sorted(last["seconds"])
        p50 = ordered[len(ordered) // 2]
        found |= {
            "p10_ms": 1e3 * ordered[len(ordered) // 10],
            "p50_ms": 1e3 * p50,
            "p90_ms": 1e3 * ordered[(9 * len(ordered)) // 10],
            "sample_ms": 1e3 * p50 / configuration.batch,
            "last_round": last["round"],
        }
    return {**found, "error": error, "rounds": rounds}


def _best(trials: Sequence[Mapping[str, Any]]) -> Configuration:
    """What beat the default settings in the last round, in which they took turns; where nothing did, they."""
    default = trials[0]
    measured = [t for t in trials if t["calls"]]
    last = max(t["last_round"] for t in measured)
    finalists = [t for t in measured if t["last_round"] == last]
    if default not in finalists:
        # It cannot run here (a runtime's own threads, say): the fastest of those that could.
        fastest = min(finalists, key=lambda t: (t["sample_ms"], json.dumps(t["configuration"])))
        return Configuration.from_dict(fastest["configuration"])
    best, least = default, 1.0
    for trial in finalists:
        ratio, sure, worst = _ratios(trial, default)
        if ratio <= _WORTH and sure >= _SURE and worst < 1 and ratio < least:
            best, least = trial, ratio
    return Configuration.from_dict(best["configuration"])


def _ratios(one: Mapping[str, Any], default: Mapping[str, Any]) -> tuple[float, float, float]:
    """Of the time a sample over the default's of the same turn: (median, share of turns below 1, largest median of a set)."""
    if one is default or not one["calls"] or not default["calls"]:
        return 1.0, 0.0, 1.0
    turns = [_turns(trial) for trial in (one, default)]
    found = [a / b for a, b in zip(*turns, strict=False)]
    ends = list(itertools.accumulate(one["rounds"][-1]["sets"] or [len(found)], initial=0))
    sets = [found[begin:end] for begin, end in itertools.pairwise(ends) if found[begin:end]]
    return (
        statistics.median(found),
        sum(r < 1 for r in found) / len(found),
        max(map(statistics.median, sets), default=1.0),
    )


def _turns(trial: Mapping[str, Any]) -> list[float]:
    """Median seconds a sample of each turn of the last round."""
    last, batch = trial["rounds"][-1], trial["configuration"]["batch"]
    count = last["calls_a_turn"]
    seconds = last["seconds"]
    return [statistics.median(seconds[i : i + count]) / batch for i in range(0, len(seconds), count)]


def machine() -> dict[str, Any]:
    """What a measurement depends on: processor, cores, system, versions."""
    from importlib.metadata import version

    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": model,
        "cores": cores,
        "system": platform.platform(),
        "torch": version("torch"),
        "python": platform.python_version(),
    }
