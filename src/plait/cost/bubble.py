"""The pipeline's schedule, simulated stage by stage: when each rank works, waits and ends.

    1F1B, 4 ranks, 4 microbatches (forward 1, backward 2):

    rank 0  F0 F1 F2 F3 .. .. B0 B0 .. B1 B1 ...
    rank 1     F0 F1 F2 .. B0 B0 F3 B1 B1 ...
    rank 2        F0 F1 B0 B0 F2 B1 B1 F3 ...
    rank 3           F0 B0 B0 F1 B1 B1 F2 B2 B2 ...

Source of the orders: GPipe (Huang et al. 2019), 1F1B (PipeDream-flush, Narayanan et al. 2021), interleaved
(Narayanan et al. 2021, arXiv 2104.04473, section 2.2), ZB-H1 (Qi et al. 2023, arXiv 2401.10241).
Known error: a send is a delay and takes no compute; a rank that waits for one does nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plait.schema.estimate import Span

__all__ = ["Result", "StageTimes", "order", "simulate", "warmup"]

_STEADY = 3  # rounds of microbatches simulated one by one; the rest repeat the last round


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one microbatch on one stage (chunk), as one rank runs it."""

    forward: float
    backward: float
    """Whole backward, recomputation included."""
    weight: float = 0.0
    """The part of `backward` that only makes weight gradients and may wait (zero-bubble)."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a schedule went."""

    end: float
    """Seconds until the last rank ends."""
    busy: tuple[float, ...]
    """Seconds of work by rank."""
    last_backward: tuple[float, ...]
    """When each rank ends its last backward."""
    spans: tuple[Span, ...]

    @property
    def bubble(self) -> float:
        """Seconds that the busiest rank waits."""
        return self.end - max(self.busy)


def warmup(schedule: str, rank: int, ranks: int, chunks: int, microbatches: int) -> int:
    """Forwards a rank runs before its first backward."""
    total = microbatches * chunks
    if schedule == "gpipe":
        return total
    if schedule == "interleaved" and chunks > 1:
        if microbatches == ranks:
            return total
        return min(total, (ranks - rank - 1) * 2 + (chunks - 1) * ranks + 1)
    return min(total, ranks - rank)


def order(schedule: str, rank: int, ranks: int, chunks: int, microbatches: int) -> list[tuple[str, int, int]]:
    """A rank's work in order, as (kind, chunk, microbatch); kind forward or backward."""
    total = microbatches * chunks
    group = ranks * chunks

    def forward(index: int) -> tuple[str, int, int]:
        if chunks == 1:
            return "forward", 0, index
        block, inside = divmod(index, group)
        return "forward", inside // ranks, block * ranks + inside % ranks

    def backward(index: int) -> tuple[str, int, int]:
        _, chunk, microbatch = forward(index)
        return "backward", chunks - 1 - chunk, microbatch

    ahead = warmup(schedule, rank, ranks, chunks, microbatches)
    work = [forward(i) for i in range(ahead)]
    for index in range(total):
        work.append(backward(index))
        if ahead + index < total:
            work.append(forward(ahead + index))
    return work


def simulate(
    schedule: str,
    stages: Sequence[StageTimes],
    *,
    ranks: int,
    microbatches: int,
    delay: float = 0.0,
    keep: int = 0,
) -> Result:
    """Runs the schedule. `stages` are in model order; stage s is chunk s // ranks of rank s % ranks.

    `delay` seconds pass between one stage's end and the next one's start on another rank. At most `keep` spans of
    each rank are recorded.
    """
    chunks = len(stages) // ranks
    rounds = ranks * (_STEADY if schedule != "gpipe" else 10**9)
    shown = microbatches
    if schedule == "gpipe":
        shown = microbatches if microbatches <= 4 * ranks else 2 * ranks
    elif microbatches > rounds + ranks:
        shown = rounds + (microbatches - rounds) % ranks
    if chunks > 1 and shown % ranks and microbatches % ranks == 0:
        shown = max(ranks, shown // ranks * ranks)
    skipped = microbatches - shown
    if schedule == "zerobubble":
        result = _greedy(stages, ranks, shown, delay, keep)
    else:
        result = _in_order(schedule, stages, ranks, chunks, shown, delay, keep)
    if not skipped:
        return result
    work = [
        sum(stages[r + c * ranks].forward + stages[r + c * ranks].backward for c in range(chunks)) for r in range(ranks)
    ]
    if schedule == "zerobubble":
        longer = _greedy(stages, ranks, shown + ranks, delay, 0)
        period = max(max(work), (longer.end - result.end) / ranks)
    else:
        period = max(work) if chunks > 1 or schedule == "gpipe" else _period(stages, delay)
    extra = skipped * period
    return Result(
        result.end + extra,
        tuple(busy + skipped * own for busy, own in zip(result.busy, work, strict=True)),
        tuple(end + extra for end in result.last_backward),
        result.spans,
    )


def _period(stages: Sequence[StageTimes], delay: float) -> float:
    """Seconds that one more microbatch adds in the steady state of 1F1B.

    k neighbouring ranks form a loop: forward through them and backward again, with k microbatches under way. The
    slowest loop decides; k = 1 is a rank's own work.
    """
    period = max(s.forward + s.backward for s in stages)
    for first in range(len(stages)):
        trip = stages[first].forward + stages[first].backward
        for last in range(first + 1, len(stages)):
            trip += stages[last].forward + stages[last].backward + 2 * delay
            period = max(period, trip / (last - first + 1))
    return period


def _in_order(schedule: str, stages: Sequence[StageTimes], ranks: int, chunks: int, microbatches: int, delay: float,
              keep: int) -> Result:  # fmt: skip
    """Each rank runs its list from front to back; a piece starts when the rank is free and its input is there."""
    work = [order(schedule, rank, ranks, chunks, microbatches) for rank in range(ranks)]
    count = len(stages)
    done_f = [[-1.0] * microbatches for _ in range(count)]
    done_b = [[-1.0] * microbatches for _ in range(count)]
    position = [0] * ranks
    free = [0.0] * ranks
    spans: list[Span] = []
    waiting = True
    hop = delay if ranks > 1 else 0.0
    while waiting:
        waiting = moved = False
        for rank in range(ranks):
            todo = work[rank]
            at, now = position[rank], free[rank]
            while at < len(todo):
                kind, chunk, microbatch = todo[at]
                stage = chunk * ranks + rank
                if kind == "forward":
                    ready = 0.0 if stage == 0 else done_f[stage - 1][microbatch]
                    lag = hop if stage else 0.0
                else:
                    last = stage == count - 1
                    ready = done_f[stage][microbatch] if last else done_b[stage + 1][microbatch]
                    lag = 0.0 if last else hop
                if ready < 0:
                    break
                start = max(now, ready + lag)
                now = start + (stages[stage].forward if kind == "forward" else stages[stage].backward)
                (done_f if kind == "forward" else done_b)[stage][microbatch] = now
                if at < keep:
                    spans.append(Span(rank=rank, kind=kind, stage=stage, microbatch=microbatch, start=start, end=now))
                at += 1
                moved = True
            position[rank], free[rank] = at, now
            waiting = waiting or at < len(todo)
        assert moved or not waiting, "the schedule waits for itself"
    busy = [
        microbatches * sum(stages[r + c * ranks].forward + stages[r + c * ranks].backward for c in range(chunks))
        for r in range(ranks)
    ]
    return Result(max(free), tuple(busy), tuple(free), tuple(spans))


def _greedy(stages: Sequence[StageTimes], ranks: int, microbatches: int, delay: float, keep: int) -> Result:
    """ZB-H1: as 1F1B, but weight gradients wait for gaps; no more microbatches in flight than 1F1B has.

    A rank takes a backward that is ready, else a forward it may start, else a waiting weight gradient.
    """
    done_f = [[-1.0] * microbatches for _ in range(ranks)]
    done_b = [[-1.0] * microbatches for _ in range(ranks)]
    next_f, next_b, next_w = [0] * ranks, [0] * ranks, [0] * ranks
    free, ends = [0.0] * ranks, [0.0] * ranks
    shown = [0] * ranks
    spans: list[Span] = []
    while min(next_w) < microbatches:
        best: tuple[float, int, int, str] | None = None
        for rank in range(ranks):
            for priority, (kind, ready) in enumerate(_ready(rank, ranks, microbatches, done_f, done_b, next_f, next_b,
                                                            next_w, delay)):  # fmt: skip
                if ready < 0:
                    continue
                option = (max(free[rank], ready), priority, rank, kind)
                if best is None or option < best:
                    best = option
        assert best is not None, "the schedule waits for itself"
        start, _, rank, kind = best
        times = stages[rank]
        length = {"forward": times.forward, "backward": times.backward - times.weight, "weight": times.weight}[kind]
        counters = {"forward": next_f, "backward": next_b, "weight": next_w}[kind]
        index, counters[rank] = counters[rank], counters[rank] + 1
        end = start + length
        if kind == "forward":
            done_f[rank][index] = end
        elif kind == "backward":
            done_b[rank][index] = end
        free[rank] = ends[rank] = end
        if shown[rank] < keep:
            shown[rank] += 1
            spans.append(Span(rank=rank, kind=kind, stage=rank, microbatch=index, start=start, end=end))
    busy = tuple(microbatches * (s.forward + s.backward) for s in stages)
    return Result(max(free), busy, tuple(ends), tuple(spans))


def _ready(rank: int, ranks: int, microbatches: int, done_f: list[list[float]], done_b: list[list[float]],
           next_f: list[int], next_b: list[int], next_w: list[int], delay: float) -> list[tuple[str, float]]:  # fmt: skip
    """(kind, when its input is there) of a rank's next backward, forward and weight gradient; -1: not yet known."""
    options = []
    index = next_b[rank]
    ready = -1.0
    if index < next_f[rank]:
        if rank == ranks - 1:
            ready = done_f[rank][index]
        elif done_b[rank + 1][index] >= 0:
            ready = done_b[rank + 1][index] + delay
    options.append(("backward", ready))
    index = next_f[rank]
    ready = -1.0
    if index < microbatches and index - next_b[rank] < ranks - rank:
        if rank == 0:
            ready = 0.0
        elif done_f[rank - 1][index] >= 0:
            ready = done_f[rank - 1][index] + delay
    options.append(("forward", ready))
    index = next_w[rank]
    options.append(("weight", done_b[rank][index] if index < next_b[rank] else -1.0))
    return options
