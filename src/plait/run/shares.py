"""Who trains which samples: a batch is cut into microbatches, each microbatch into the replicas' shares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from plait.run.layout import split_evenly

__all__ = ["shares"]


def shares(batch: int, microbatches: int, replicas: int, weights: Sequence[int] = ()) -> list[list[tuple[int, int]]]:
    """`[microbatch][replica] -> (start, stop)` in the global batch, the first parts larger where it does not divide.

    Each microbatch is cut in the proportion of `weights` (a plan's `batch_shares`), evenly without. A batch smaller
    than microbatches x replicas leaves some shares empty; nothing is padded or dropped.
    """
    table = []
    for index in range(microbatches):
        start, stop = split_evenly(batch, microbatches, index)
        edges = accumulate(_parts(stop - start, weights or (1,) * replicas), initial=start)
        table.append(list(pairwise(edges)))
    return table


def _parts(size: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in the proportion of `weights` that sum to `size`; largest remainders first, then first ones."""
    total = sum(weights)
    parts = [size * weight // total for weight in weights]
    left = size - sum(parts)
    for index in sorted(range(len(weights)), key=lambda i: -(size * weights[i] % total))[:left]:
        parts[index] += 1
    return parts
