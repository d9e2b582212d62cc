"""Processes that share the cores of one computer: work and waits on a timeline with too few cores.

    4 stages on 2 cores, 1F1B: while ranks 2 and 3 wait for their first input, 0 and 1 have a core each

    rank 0  F0F0 F1F1 F2F2 F2..                        every working rank gets cores / working ranks,
    rank 1       F0F0 F1F1F1 F2                        at most one core
    rank 2            F0F0F0F0 ...

Total work is conserved: a step takes at least all ranks' seconds of cores over the number of cores, and at least
its longest chain at full speed. A bubble is no lost time while others use the core. A wait (a message under way, a
process that is not back on a core yet) takes no core and others work meanwhile.
Source: processor sharing (Kleinrock 1967), as Linux's scheduler does it from a few milliseconds on. Known error: the
scheduler works in slices, so that neighbours end up to a slice apart; that is in the measured waits of the collectives, not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plait.cost.bubble import Result, StageTimes, order
from plait.schema.estimate import Span
from plait.schema.timing import Timing

__all__ = ["Tail", "interpolate", "simulate_shared"]

_ROUNDS = 4  # of as many microbatches as ranks that are simulated; the rest repeat the last one


@dataclass(frozen=True, slots=True)
class Tail:
    """What a rank does after its last backward."""

    work: float
    """Seconds of a core."""
    wait: float


def interpolate(timings: Sequence[Timing], collective: str, ranks: int, nbytes: float) -> tuple[float, float]:
    """(seconds of a core, further wait) of `collective` over `ranks`, between the measured sizes; linear beyond them.

    A group size that was not measured takes the figures of the nearest one. (0, 0) where the collective was not measured.
    """
    own = [t for t in timings if t.collective == collective]
    if not own:
        return 0.0, 0.0
    nearest = min({t.ranks for t in own}, key=lambda count: (abs(math.log(count / ranks)), count))
    points = sorted((t.nbytes, t.core, t.wait) for t in own if t.ranks == nearest)
    sizes = [size for size, _, _ in points]
    return (
        _between(sizes, _rising([core for _, core, _ in points]), nbytes),
        _between(sizes, _rising([wait for _, _, wait in points]), nbytes),
    )


def _rising(values: list[float]) -> list[float]:
    """More bytes never take less: what noise says otherwise is levelled out."""
    return [max(values[: i + 1]) for i in range(len(values))]


def _between(sizes: list[float], values: list[float], at: float) -> float:
    if at <= sizes[0] or len(sizes) == 1:
        return values[0]
    right = next((i for i, size in enumerate(sizes) if size >= at), len(sizes) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (sizes[right] - sizes[left])
    return values[left] + slope * (at - sizes[left])


def simulate_shared(
    schedule: str,
    stages: Sequence[StageTimes],
    tails: Sequence[Tail],
    *,
    microbatches: int,
    cores: float,
    processes: float,
    delay: float = 0.0,
    handling: float = 0.0,
    keep: int = 0,
) -> Result:
    """As `bubble.simulate`, `processes` of every pipeline rank and all ranks on `cores`; `tails` by rank.

    `delay` seconds without a core pass between stages on different ranks, `handling` seconds of a core on either side.
    """
    ranks = len(tails)
    chunks = len(stages) // ranks
    shown = min(microbatches, _ROUNDS * ranks)
    share = cores / processes
    result = _fluid(schedule, stages, tails, chunks, shown, share, delay, handling, keep)
    left = microbatches - shown
    if not left:
        return result
    shorter = _fluid(schedule, stages, tails, chunks, shown - ranks, share, delay, handling, 0)
    extra = left * (result.end - shorter.end) / ranks
    busy = tuple(b + left * (b - s) / ranks for b, s in zip(result.busy, shorter.busy, strict=True))
    return Result(result.end + extra, busy, tuple(t + extra for t in result.last_backward), result.spans)


def _fluid(schedule: str, stages: Sequence[StageTimes], tails: Sequence[Tail], chunks: int, microbatches: int,
           share: float, delay: float, handling: float, keep: int) -> Result:  # fmt: skip
    """Each rank goes through its list; ranks that work share the cores evenly (`share`: cores for each process of a rank)."""
    ranks, count = len(tails), len(stages)
    lists = [[*order(schedule, rank, ranks, chunks, microbatches), ("optimizer", 0, 0)] for rank in range(ranks)]
    at = [0] * ranks
    state: list[list[float] | None] = [None] * ranks  # [wait, work, start] of the piece under way
    done: dict[tuple[str, int, int], float] = {}
    busy, last = [0.0] * ranks, [0.0] * ranks
    spans: list[Span] = []
    now = 0.0
    while any(position < len(todo) for position, todo in zip(at, lists, strict=True)):
        until = math.inf
        for rank in range(ranks):
            if state[rank] is None and at[rank] < len(lists[rank]):
                kind, chunk, microbatch = lists[rank][at[rank]]
                ready = _ready(kind, chunk * ranks + rank, microbatch, count, done, delay if ranks > 1 else 0.0)
                if ready <= now:
                    hops = handling * _hops(kind, chunk * ranks + rank, count) if ranks > 1 else 0.0
                    wait, work = _piece(kind, stages[chunk * ranks + rank], tails[rank], split=schedule == "zerobubble")
                    state[rank] = [wait, work + hops, now]
                else:
                    until = min(until, ready)
        working = [s for s in state if s is not None and s[0] <= 0]
        rate = min(1.0, share / len(working)) if working else 1.0
        ends = [now + (s[0] if s[0] > 0 else s[1] / rate) for s in state if s is not None]
        then = min([until, *ends])
        assert math.isfinite(then), "the schedule waits for itself"
        for rank, own in enumerate(state):
            if own is None:
                continue
            waiting = own[0] > 0
            end = now + (own[0] if waiting else own[1] / rate)
            spent = then - now
            if end > then:
                own[0 if waiting else 1] -= spent * (1.0 if waiting else rate)
            elif waiting:
                own[0] = 0.0
            else:
                kind, chunk, microbatch = lists[rank][at[rank]]
                done[kind, chunk * ranks + rank, microbatch] = then
                busy[rank] += then - own[2]
                last[rank] = then if kind != "optimizer" else last[rank]
                if at[rank] < keep:
                    spans.append(Span(rank=rank, kind=kind, stage=chunk * ranks + rank, microbatch=microbatch,
                                      start=own[2], end=then))  # fmt: skip
                at[rank], state[rank] = at[rank] + 1, None
        now = then
    return Result(now, tuple(busy), tuple(last), tuple(spans))


def _ready(
    kind: str, stage: int, microbatch: int, count: int, done: dict[tuple[str, int, int], float], delay: float
) -> float:
    """When a piece may start; infinite while what it waits for is not done."""
    if kind in ("weight", "optimizer") or (kind == "forward" and stage == 0):
        return 0.0
    if kind == "forward":
        return done.get(("forward", stage - 1, microbatch), math.inf) + delay
    if stage == count - 1:
        return done.get(("forward", stage, microbatch), math.inf)
    return done.get(("backward", stage + 1, microbatch), math.inf) + delay


def _hops(kind: str, stage: int, count: int) -> int:
    """Messages that a piece of work receives or sends."""
    return (int(stage > 0) + int(stage < count - 1)) if kind in ("forward", "backward") else 0


def _piece(kind: str, stage: StageTimes, tail: Tail, *, split: bool) -> tuple[float, float]:
    """(wait, seconds of a core)."""
    if kind == "optimizer":
        return tail.wait, tail.work
    if kind == "forward":
        return stage.forward_wait, stage.forward - stage.forward_wait
    if kind == "weight":
        return 0.0, stage.weight
    return stage.backward_wait, stage.backward - stage.backward_wait - (stage.weight if split else 0.0)
