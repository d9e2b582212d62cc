"""Shares: every sample is trained once, by one replica, in one microbatch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from plait.run.shares import shares


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6))
def test_every_sample_once(batch: int, microbatches: int, replicas: int) -> None:
    """Nothing is padded, repeated or dropped, whatever divides or does not."""
    table = shares(batch, microbatches, replicas)

    assert [i for row in table for start, stop in row for i in range(start, stop)] == list(range(batch))
    assert all(len(row) == replicas for row in table)


def test_a_small_batch_leaves_replicas_idle() -> None:
    """Three samples for two microbatches of two replicas."""
    assert shares(3, 2, 2) == [[(0, 1), (1, 2)], [(2, 3), (3, 3)]]
