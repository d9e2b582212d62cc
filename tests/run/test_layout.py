"""Shards: whatever is cut, the pieces make up the whole, and each element is held once."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.run.layout import Layout, split_evenly

PARTS = st.lists(st.integers(1, 7), min_size=1, max_size=3)


@given(st.integers(0, 50), st.integers(1, 8))
def test_an_even_split_leaves_nothing_out(size: int, count: int) -> None:
    """Parts follow one another, and differ by at most one."""
    cuts = [split_evenly(size, count, i) for i in range(count)]

    assert cuts[0][0] == 0
    assert cuts[-1][1] == size
    assert all(a[1] == b[0] for a, b in pairwise(cuts))
    assert max(b - a for a, b in cuts) - min(b - a for a, b in cuts) <= 1


@given(PARTS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_shares_of_shares_make_up_the_whole(parts: list[int], tp: int, fsdp: int, rows: int) -> None:
    """A fused projection split over tp, then its rows over fsdp: put back together it is the tensor again."""
    whole = torch.arange(rows * sum(parts), dtype=torch.float32).view(rows, sum(parts))
    back = torch.full_like(whole, -1)
    held = 0
    for rank in range(tp):
        layout = Layout.full(tuple(whole.shape)).split(1, tuple(parts), rank, tp)
        for shard in range(fsdp):
            share = layout.rows(*split_evenly(rows, fsdp, shard))
            local = share.take(whole)
            assert local.shape == share.local_shape
            share.put(local, back)
            held += local.numel()

    assert torch.equal(back, whole)
    assert held == whole.numel()


def test_each_block_is_split_by_itself() -> None:
    """Queries and keys in one matrix: each process gets its half of both."""
    whole = torch.arange(8)
    first = Layout.full((8,)).split(0, (4, 4), 0, 2)

    assert first.take(whole).tolist() == [0, 1, 4, 5]
    assert not first.is_full
    assert Layout.full((8,)).is_full
