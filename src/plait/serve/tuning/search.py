"""The search of `plait.serve.tuning.tune`: successive halving around the best so far, then a confirmation beside the default.

time    ├──────────── search ─────────────┤├─ confirmation ─┤
round    1: default + drawn   2: default + best's neighbours   ...   last: default + the two best, fresh processes, thrice
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from plait.serve.manifest import folder_bytes
from plait.serve.tuning.record import Configuration
from plait.serve.tuning.trial import CALLS, Trial

__all__ = ["Runtime", "Search", "Space"]

_LIVE = 8  # processes at once, at most: each holds a runtime and a model
_PYTHON = 3e8  # bytes of a process with torch that has loaded nothing yet
_START = 3.0  # seconds that a process takes to import and load: a short search has fewer of them
_TURNS = 3  # before the slower half goes
_MOST = 100  # calls of one configuration in a round of the search: more say no more
_SEARCH = 0.65  # of the time; the rest confirms
_FINALISTS = 2  # beside the default
_SETS = 3  # of fresh processes in the confirmation: how memory falls to a process can make a difference, too
_FINAL_TURNS = (2, 30)  # of each set, least and most


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What an artefact runs with."""

    knobs: Mapping[str, Sequence[Any]]
    interpreter: str
    openmp: bool
    """Whether OpenMP's variables change how it runs."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """The settings to choose from."""

    runtimes: Mapping[str, Runtime]
    """By artefact."""
    threads: Sequence[int]
    batches: Sequence[int]
    cores: Sequence[int]
    default: Configuration
    waits: Sequence[str] = ("", "PASSIVE", "ACTIVE")

    def neighbours(self, one: Configuration) -> list[Configuration]:
        """Every configuration that differs in one setting."""
        found = [replace(one, threads=n, cpus=()) for n in self.threads]
        found += [replace(one, cpus=tuple(self.cores[: one.threads])), replace(one, cpus=())]
        found += [replace(one, batch=n) for n in self.batches]
        found += [replace(one, wait=w) for w in self.waits]
        for name, values in self.runtimes[one.artefact].knobs.items():
            for value in values:
                rest = {n: v for n, v in one.knobs.items() if n != name}
                # A knob at its default is left out, so that one configuration has one spelling.
                found.append(replace(one, knobs=rest if value == values[0] else {**rest, name: value}))
        found += [replace(one, artefact=folder, knobs={}) for folder in self.runtimes]
        found = [self.plain(c) for c in found]
        return [c for i, c in enumerate(found) if c != one and c not in found[:i]]

    def drawn(self, generator: random.Random) -> Configuration:
        """One at random: mostly defaults, since most settings gain little and some cost much."""
        one = replace(self.default, artefact=generator.choice(list(self.runtimes)))
        for _ in range(generator.choice((1, 1, 2, 3))):
            one = generator.choice(self.neighbours(one) or [one])
        return one

    def plain(self, one: Configuration) -> Configuration:
        """Without the settings that change nothing for its runtime."""
        if self.runtimes[one.artefact].openmp:
            return one
        # Only OpenMP ties each thread to a core; for the others all cores are no restriction.
        return replace(one, wait="", cpus=() if len(one.cpus) == len(self.cores) else one.cpus)


def _that_fit(folders: Iterable[str]) -> int:
    """Processes that fit into half of the free memory; each may hold the largest artefact three times while it loads."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):  # another system: not known
        return _LIVE
    largest = max(folder_bytes(Path(folder)) for folder in folders)
    return int(free / 2 / (3 * largest + _PYTHON))


class Search:
    """What is tried, and what it measured."""

    def __init__(self, space: Space, seconds: float, generator: random.Random, tell: Callable[[str], None]) -> None:
        self._space, self._generator, self._tell = space, generator, tell
        begin = time.monotonic()
        self._search_end, self._end = begin + _SEARCH * seconds, begin + seconds
        self._live = max(2, min(_LIVE, int(_SEARCH * seconds / _START), _that_fit(space.runtimes)))
        self._seen: dict[Configuration, dict[str, Any]] = {}
        self._relative: dict[Configuration, float] = {}
        """Cost over the default's in the same round, the latest."""
        self._least: dict[Configuration, float] = {}
        """Seconds a sample in the fastest of its rounds."""
        self._round = 0

    def run(self) -> list[dict[str, Any]]:
        """Every trial, the default's first; what took part in the last round has it as its last."""
        group = self._first_group()
        while group:
            winner = self._halved(group)
            if winner is None or time.monotonic() >= self._search_end:
                break
            group = self._next_group(winner)
        if self._relative:
            self._confirm([self._space.default, *self._finalists()])
        return list(self._seen.values())

    def _finalists(self) -> list[Configuration]:
        """The best beside the default of its own round, and the best in seconds: a disturbed round misleads one of the two."""
        relative = sorted(self._relative, key=lambda c: self._relative[c])
        absolute = sorted(self._least, key=lambda c: self._least[c])
        return list(dict.fromkeys([relative[0], absolute[0], *relative]))[:_FINALISTS]

    def _first_group(self) -> list[Configuration]:
        default = self._space.default
        group = [default, *(replace(default, artefact=folder) for folder in self._space.runtimes)]
        return self._filled(group)

    def _next_group(self, winner: Configuration) -> list[Configuration]:
        """The winner and the default meet the winner's neighbours in the same minutes."""
        fresh = [c for c in self._space.neighbours(winner) if c not in self._seen]
        self._generator.shuffle(fresh)
        group = [self._space.default, winner]
        filled = self._filled([*group, *fresh])
        return filled if len(filled) > len(set(group)) else []

    def _filled(self, group: list[Configuration]) -> list[Configuration]:
        """Different ones, as many as may live at once; what lacks is drawn."""
        found = list(dict.fromkeys(map(self._space.plain, group)))
        for _ in range(20 * self._live):
            if len(found) >= self._live:
                break
            drawn = self._space.drawn(self._generator)
            if drawn not in found and drawn not in self._seen:
                found.append(drawn)
        # Even a short search begins with one of each artefact.
        least = min(_LIVE, len(self._space.runtimes) + 1) if self._round == 0 else 0
        return found[: max(self._live, least)]

    def _started(self, group: Sequence[Configuration], stack: ExitStack) -> dict[Configuration, Trial]:
        """A live process for each that loads; what does not is noted."""
        limit = max(60.0, self._end - time.monotonic())
        trials = {}
        for one in group:
            runtime = self._space.runtimes[one.artefact]
            trials[one] = Trial(one, interpreter=runtime.interpreter, openmp=runtime.openmp, limit=limit)
            stack.callback(trials[one].close)
        for one, trial in trials.items():
            entry = self._seen.setdefault(one, {"configuration": asdict(one), "rounds": [], "error": ""})
            if not trial.is_ready():
                entry["error"] = trial.error
        return {one: trial for one, trial in trials.items() if not trial.error}

    def _note(self, one: Configuration, seconds: Sequence[float], slow: bool, sets: Sequence[int] = ()) -> None:
        if seconds:
            kept = {
                "round": self._round,
                "calls_a_turn": 1 if slow else CALLS,
                "sets": list(sets),
                "seconds": [round(s, 9) for s in seconds],
            }
            self._seen[one]["rounds"].append(kept)

    def _halved(self, group: Sequence[Configuration]) -> Configuration | None:
        """The fastest of a group; all of its processes have ended when this returns."""
        self._round += 1
        default = self._space.default
        with ExitStack() as stack:
            live = self._started(group, stack)
            everything, slow, told = dict(live), any(trial.slow for trial in live.values()), 0
            while live:
                for _ in range(_TURNS):
                    for trial in live.values():
                        trial.measure(slow=slow)
                    if time.monotonic() >= self._search_end:
                        break
                for one in [c for c, trial in live.items() if trial.error]:
                    live.pop(one).close()
                ranked = sorted(live, key=lambda c: live[c].cost)
                if not ranked:
                    break
                if len(live) != told:
                    told = len(live)
                    fastest = 1e3 * live[ranked[0]].cost
                    self._tell(f"round {self._round}: {told} left, fastest {fastest:.3g} ms a sample")
                over = time.monotonic() >= self._search_end or len(live[ranked[0]].seconds) >= _MOST
                if over or len(ranked) == 1:
                    break
                for one in ranked[max(2, (len(ranked) + 1) // 2) :]:
                    if one != default:  # which all are compared with
                        live.pop(one).close()
            # Where the default settings do not run, seconds are compared.
            base = everything[default].cost if default in everything and not everything[default].error else 1.0
            for one, trial in everything.items():
                self._seen[one]["error"] = trial.error
                self._note(one, trial.seconds, slow)
                if one != default and trial.cost < float("inf"):
                    self._relative[one] = trial.cost / base
                    self._least[one] = min(self._least.get(one, float("inf")), trial.cost)
            good = [one for one in live if live[one].cost < float("inf")]
            return min(good, key=lambda c: live[c].cost, default=None)

    def _confirm(self, group: Sequence[Configuration]) -> None:
        """One more round, in sets of fresh processes."""
        self._round += 1
        self._tell(f"round {self._round}: {len(group) - 1} beside the default, in new processes")
        gathered: dict[Configuration, list[float]] = {one: [] for one in group}
        least, most = _FINAL_TURNS
        slow, turns = False, []
        for number in range(_SETS):
            now = time.monotonic()
            stop = now + (self._end - now) / (_SETS - number)
            with ExitStack() as stack:
                live = self._started(list(gathered), stack)
                slow = slow or (not number and any(trial.slow for trial in live.values()))
                order, turn = list(live), 0
                while turn < least or (turn < most and time.monotonic() < stop):
                    for one in order:
                        live[one].measure(slow=slow)
                    order, turn = [*order[1:], *order[:1]], turn + 1
                turns.append(turn)
                for one in list(gathered):
                    if one in live and not live[one].error:
                        gathered[one] += live[one].seconds
                        continue
                    if one in live:
                        self._seen[one]["error"] = live[one].error
                    del gathered[one]
        for one, seconds in gathered.items():
            self._note(one, seconds, slow, turns)
