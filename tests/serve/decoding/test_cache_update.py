"""The choice that updates a cache becomes a scatter, and nothing else does."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from plait.serve.decoding.cache_update import scattered

CAPACITY = 6


class Step(nn.Module):
    """A cache's update, as decode programs write it, and its use; `other`: what must stay as it is."""

    def __init__(self, dim: int, other: str = "") -> None:
        super().__init__()
        self.dim, self.other = dim, other

    def forward(self, new: torch.Tensor, position: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The cache with the new value, and its sum."""
        shape = [1] * cache.dim()
        shape[self.dim] = CAPACITY
        every = torch.arange(CAPACITY)
        here = every <= position if self.other == "compared" else every == position
        held = cache + 1 if self.other == "computed" else cache
        value = new.sum(self.dim, keepdim=True).sum() if self.other == "scalar" else new
        updated = torch.where(here.reshape(shape), value, held)
        return updated, updated.sum()


@pytest.mark.parametrize(("dim", "other"), [(1, ""), (2, ""), (0, ""), (1, "compared"), (1, "computed"), (1, "scalar")])
def test_results_are_the_same(dim: int, other: str) -> None:
    """At the first position, in between and at the last; after a round through a file, too."""
    sizes = [2, 3, 4]
    sizes[dim] = CAPACITY
    cache = torch.randn(sizes)
    row = list(sizes)
    row[dim] = 1
    step = Step(dim, other)
    program = torch.export.export(step, (torch.randn(row), torch.tensor([1]), cache), strict=False)
    changed = scattered(program)
    file = io.BytesIO()
    torch.export.save(changed, file)
    file.seek(0)
    run = torch.export.load(file).module(check_guards=False)

    assert ("scatter" in changed.graph_module.code) is (other == "")
    for position in (0, 3, CAPACITY - 1):
        new, at = torch.randn(row), torch.tensor([position])
        for got, expected in zip(run(new, at, cache), step(new, at, cache), strict=True):
            assert torch.equal(got, expected)
