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


@given(st.integers(1, 40), st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_weights_divide_every_microbatch(batch: int, microbatches: int, weights: list[int]) -> None:
    """Every sample once, each share within one sample of its part."""
    table = shares(batch, microbatches, len(weights), weights)

    assert [i for row in table for start, stop in row for i in range(start, stop)] == list(range(batch))
    for row in table:
        whole = row[-1][1] - row[0][0]
        for (start, stop), weight in zip(row, weights, strict=True):
            assert abs((stop - start) - whole * weight / sum(weights)) < 1


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
def test_equal_weights_are_even_shares(batch: int, microbatches: int, replicas: int, weight: int) -> None:
    """Equal weights, whatever they are, change nothing."""
    assert shares(batch, microbatches, replicas, (weight,) * replicas) == shares(batch, microbatches, replicas)


def test_a_small_batch_leaves_replicas_idle() -> None:
    """Three samples for two microbatches of two replicas."""
    assert shares(3, 2, 2) == [[(0, 1), (1, 2)], [(2, 3), (3, 3)]]
