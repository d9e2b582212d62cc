"""Splits of a dim."""

from __future__ import annotations

from plait.run.shard.placement import Sharded, refined, sharded


def test_equal_blocks_are_one_block_that_repeats() -> None:
    """Queries, keys and values of equal size: one block that repeats."""
    assert sharded(0, (8, 8, 8), 2) == sharded(0, (8,), 2)


def test_grains_that_need_no_care_are_forgotten() -> None:
    """Where heads divide by the ranks, a plain split keeps them whole."""
    assert sharded(0, (32,), 2, unit=8).unit == 1
    assert sharded(0, (24,), 2, unit=8).unit == 8


def test_every_rank_holds_whole_grains() -> None:
    """Three heads of eight on two ranks."""
    split = sharded(0, (24,), 2, unit=8)

    assert [split.ranges(2, rank) for rank in (0, 1)] == [[(0, 16)], [(16, 24)]]


def test_layouts_of_all_ranks_make_the_whole() -> None:
    """Every row is held exactly once."""
    for split in (sharded(0, (24,), 2, unit=8), sharded(0, (16, 4, 4), 2), sharded(0, (7,), 2)):
        size = split.period
        rows = [0] * size
        for rank in (0, 1):
            for piece in split.layout((size, 3), 2, rank).pieces:
                for row in range(piece.whole[0], piece.whole[0] + piece.size[0]):
                    rows[row] += 1

        assert rows == [1] * size


def test_elements_are_never_cut() -> None:
    """Eight rows as two of four can be split in two; as eight of one in three parts they can't."""
    assert Sharded(0, (8,)).scaled(1, 4, 2) == Sharded(0, (2,))
    assert Sharded(0, (8,)).scaled(1, 8, 2) is None


def test_a_wish_of_a_piece_is_a_wish_of_its_source() -> None:
    """A state-space layer's projection, whose middle piece is cut again."""
    source, here, wish = Sharded(0, (64, 96, 8)), Sharded(1, (96,)), Sharded(1, (64, 16, 16))

    assert refined(source, here, wish, 2) == Sharded(0, (64, 64, 16, 16, 8))
