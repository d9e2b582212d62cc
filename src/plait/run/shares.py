"""Who trains which samples: a batch is cut into microbatches, each microbatch into the replicas' shares."""

from __future__ import annotations

from plait.run.layout import split_evenly

__all__ = ["shares"]


def shares(batch: int, microbatches: int, replicas: int) -> list[list[tuple[int, int]]]:
    """`[microbatch][replica] -> (start, stop)` in the global batch, the first parts larger where it does not divide.

    A batch smaller than microbatches x replicas leaves some shares empty; nothing is padded or dropped.
    """
    table = []
    for index in range(microbatches):
        start, stop = split_evenly(batch, microbatches, index)
        cuts = [split_evenly(stop - start, replicas, replica) for replica in range(replicas)]
        table.append([(start + low, start + high) for low, high in cuts])
    return table
