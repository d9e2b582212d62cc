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

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from plait.schema.estimate import Span

__all__ = ["Result", "StageTimes", "least_seconds", "order", "simulate", "warmup"]

_STEADY = 3  # rounds of microbatches simulated one by one; the rest repeat the last round


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one microbatch on one stage (chunk), as one rank runs it."""

    forward: float
    backward: float
    """Whole backward, recomputation included."""
    weight: float = 0.0
    """The part of `backward` that only makes weight gradients and may wait (zero-bubble)."""
    forward_wait: float = 0.0
    """The part of `forward` in which a process leaves its core to others; counts where cores are shared (`cores`)."""
    backward_wait: float = 0.0


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


@functools.lru_cache(maxsize=4096)
def order(schedule: str, rank: int, ranks: int, chunks: int, microbatches: int) -> tuple[tuple[str, int, int], ...]:
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
    late = min(rank, total)  # ZB-H1: rank r's weight gradients run r microbatches behind and fill its gap at the end
    for index in range(total):
        work.append(backward(index))
        if schedule == "zerobubble" and index >= late:
            work.append(("weight", 0, index - late))
        if ahead + index < total:
            work.append(forward(ahead + index))
    if schedule == "zerobubble":
        work += [("weight", 0, index) for index in range(total - late, total)]
    return tuple(work)


def least_seconds(stages: Sequence[StageTimes], *, ranks: int, microbatches: int, late: float = 1.0) -> float:
    """Seconds that no order of work can beat.

    A rank cannot start before the first microbatch has passed the stages before its first one, nor do these end before
    they have taken the last one back after it; `late` is the part of a backward that must have happened by then (0 where weight gradients may
    fill the end).
    """
    before = best = 0.0
    for rank in range(ranks):
        own = sum(stage.forward + stage.backward for stage in stages[rank::ranks])
        best = max(best, microbatches * own + before)
        before += stages[rank].forward + late * stages[rank].backward
    return best


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
    result = _in_order(schedule, stages, ranks, chunks, shown, delay, keep)
    if not skipped:
        return result
    work = [
        sum(stages[r + c * ranks].forward + stages[r + c * ranks].backward for c in range(chunks)) for r in range(ranks)
    ]
    if schedule == "zerobubble":
        longer = _in_order(schedule, stages, ranks, chunks, shown + ranks, delay, 0)
        period = max(*work, (longer.end - result.end) / ranks)
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
    split = schedule == "zerobubble"
    while waiting:
        waiting = moved = False
        for rank in range(ranks):
            todo = work[rank]
            at, now = position[rank], free[rank]
            while at < len(todo):
                kind, chunk, microbatch = todo[at]
                stage = chunk * ranks + rank
                if kind == "weight":
                    ready, lag = 0.0, 0.0
                elif kind == "forward":
                    ready = 0.0 if stage == 0 else done_f[stage - 1][microbatch]
                    lag = hop if stage else 0.0
                else:
                    last = stage == count - 1
                    ready = done_f[stage][microbatch] if last else done_b[stage + 1][microbatch]
                    lag = 0.0 if last else hop
                if ready < 0:
                    break
                start = max(now, ready + lag)
                if kind == "forward":
                    now = done_f[stage][microbatch] = start + stages[stage].forward
                elif kind == "weight":
                    now = start + stages[stage].weight
                else:
                    now = start + stages[stage].backward - (stages[stage].weight if split else 0.0)
                    done_b[stage][microbatch] = now
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
