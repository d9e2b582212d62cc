"""Weights that several pipeline stages use: one parameter for the user, a copy on each stage's process.

Each stage's backward gives its own part of the gradient. The parts are summed over the owning processes before
clipping and stepping, so that the copies stay equal; norms and checkpoints count the first.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from plait.run.world import World
from plait.schema import Plan

__all__ = ["TiedWeights"]


class TiedWeights:
    """Sums gradients of `holders` (name -> stages that use it) over the stages' processes."""

    def __init__(self, holders: dict[str, list[int]], plan: Plan, world: World) -> None:
        self._groups: dict[str, dist.ProcessGroup] = {}
        made: dict[tuple[int, ...], list[tuple[list[int], dist.ProcessGroup]]] = {}
        # Every process makes every group, in the same order: new_group is a collective.
        for name in sorted(holders):
            ranks = tuple(sorted({stage % plan.pp for stage in holders[name]}))
            if ranks not in made:
                made[ranks] = [(members, dist.new_group(members)) for members in world.ranks_of_stages(list(ranks))]
            mine = [group for members, group in made[ranks] if world.rank in members]
            if mine:
                self._groups[name] = mine[0]

    @property
    def names(self) -> list[str]:
        """The tied weights that this process holds."""
        return list(self._groups)

    def sum_gradients(self, gradients: dict[str, torch.Tensor]) -> None:
        """All-reduce, in place, the local gradients of the tied weights, by name, in the same order everywhere."""
        for name, group in sorted(self._groups.items()):
            dist.all_reduce(gradients[name], group=group)
