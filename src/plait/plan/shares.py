"""How many samples each replica of a mixed cluster gets, so that all are done together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

__all__ = ["all_divisions", "by_speed", "neighbours"]


def by_speed(total: int, counts: Sequence[int], seconds: Callable[[int, int], float]) -> list[int]:
    """Samples of each kind of replica, all of its replicas together: the slowest replica is as fast as it can be.

    `counts` are the replicas of each kind, among which its samples are spread evenly; `seconds(kind, samples)` is the
    time of one replica and must not fall when samples rise. Every replica gets at least one of the `total` samples.

    From shares in proportion to speed, samples are moved from the slowest kind while that helps. That is the optimum: a
    better division would give the slowest kind less and another kind more without making that one as slow, so one of
    the moves that are tried here would have helped.
    """
    assert total >= sum(counts) > 0
    even = max(1, total // sum(counts))
    speed = [count * even / seconds(kind, even) for kind, count in enumerate(counts)]
    held = [max(count, int(total * v / sum(speed))) for count, v in zip(counts, speed, strict=True)]
    # What rounding left over or took too much goes to, or comes from, the kinds with most.
    while (missing := total - sum(held)) != 0:
        room = [h - c if missing < 0 else 1 for h, c in zip(held, counts, strict=True)]
        kind = max((k for k in range(len(held)) if room[k] > 0), key=lambda k: held[k] - counts[k])
        held[kind] += missing if missing > 0 else max(missing, -room[kind])

    while True:
        times = [seconds(kind, -(-h // c)) for kind, (h, c) in enumerate(zip(held, counts, strict=True))]
        giver = max(range(len(held)), key=times.__getitem__)
        spare = (held[giver] - 1) % counts[giver] + 1  # fewer would leave its fullest replica as it is
        if held[giver] - spare < counts[giver]:
            return held
        moves = _taken(spare, giver, held, counts, seconds)
        if moves is None:
            return held
        held[giver] -= spare
        for kind, more in enumerate(moves):
            held[kind] += more


def _taken(
    spare: int, giver: int, held: Sequence[int], counts: Sequence[int], seconds: Callable[[int, int], float]
) -> list[int] | None:
    """Samples that each other kind takes of `spare`, none becoming as slow as the giver is; None: there is no room."""
    moves = [0] * len(held)
    limit = seconds(giver, -(-held[giver] // counts[giver]))
    for kind in range(len(held)):
        while kind != giver and spare > 0:
            whole = held[kind] + moves[kind]
            # Up to the next whole sample on each of its replicas costs the same time as one sample.
            level = -whole % counts[kind] or counts[kind]
            if seconds(kind, -(-(whole + 1) // counts[kind])) >= limit:
                break
            moves[kind] += min(level, spare)
            spare -= min(level, spare)
    return moves if spare == 0 else None


def all_divisions(total: int, counts: Sequence[int], most: int) -> Iterator[list[int]] | None:
    """Every division of `total` over the kinds that leaves each replica a sample, or None where there are more than `most`."""
    spare, kinds = total - sum(counts), len(counts)
    if math.comb(spare + kinds - 1, kinds - 1) > most:
        return None
    bars = itertools.combinations(range(spare + kinds - 1), kinds - 1)
    return (
        [count + b - a - 1 for count, a, b in zip(counts, (-1, *bar), (*bar, spare + kinds - 1), strict=True)]
        for bar in bars
    )


def neighbours(held: Sequence[int], counts: Sequence[int]) -> Iterator[list[int]]:
    """Divisions in which one kind's fullest replicas give a sample each to another kind.

    What is done once a step, and how sharding's messages hide behind the work, may make one of these the better; from
    eight samples on one more is too little a change to pay for the search.
    """
    for giver, taker in itertools.permutations(range(len(held)), 2):
        moved = (held[giver] - 1) % counts[giver] + 1
        if held[giver] - moved >= counts[giver] and held[giver] <= 8 * counts[giver]:
            yield [h - moved * (k == giver) + moved * (k == taker) for k, h in enumerate(held)]
