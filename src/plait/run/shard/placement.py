"""How a tensor lies on the ranks of a tensor-parallel group.

| placement    | forward value on each rank      | gradient on each rank    |
|--------------|---------------------------------|--------------------------|
| REPLICATED   | the whole value                 | the whole gradient       |
| COPIED       | the whole value                 | a part of a sum          |
| PARTIAL      | a part of a sum                 | the whole gradient       |
| Sharded      | a slice along one dim           | the same slice           |

Every conversion between two of them is a collective (or nothing at all) whose backward is the conversion of the
gradient; see `collectives.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from plait.run.layout import Layout, Piece, split_evenly

__all__ = ["COPIED", "PARTIAL", "REPLICATED", "Placement", "Sharded", "Whole", "refined", "sharded"]


class Whole(Enum):
    """The placements that have no dim."""

    REPLICATED = "replicated"
    COPIED = "copied"
    PARTIAL = "partial"

    def __repr__(self) -> str:
        return self.value


REPLICATED, COPIED, PARTIAL = Whole.REPLICATED, Whole.COPIED, Whole.PARTIAL


@dataclass(frozen=True, slots=True)
class Sharded:
    """Split along `dim`. Build it with `sharded`, which reduces it to its normal form.

    The dim is a row of blocks of sizes `parts`, repeated until the dim is full, and each block is split among the
    ranks by itself, in grains of `unit` that stay together:

        parts=(8,)        dim of 8:   0 0 0 0 1 1 1 1          a plain split in two
        parts=(4,)        dim of 8:   0 0 1 1 0 0 1 1          two blocks, such as keys and values in one matrix
        parts=(4, 2)      dim of 6:   0 0 1 1 0 1              blocks of different sizes
        parts=(6,) unit=2 dim of 6:   0 0 0 0 1 1              three heads of 2 on two ranks

    The repetition makes it independent of the batch: heads in a dim of batch x heads have parts=(heads,).
    """

    dim: int
    parts: tuple[int, ...]
    unit: int = 1

    @property
    def period(self) -> int:
        """Size of the row of blocks that repeats."""
        return sum(self.parts)

    def is_even(self, tp: int) -> bool:
        """Whether every rank holds the same size."""
        return all((part // self.unit) % tp == 0 for part in self.parts)

    def fits(self, tp: int) -> bool:
        """Whether every rank gets something of every block."""
        return all(part % self.unit == 0 and part // self.unit >= tp for part in self.parts)

    def ranges(self, tp: int, rank: int) -> list[tuple[int, int]]:
        """(start, stop) within one period of each block's share of `rank`."""
        found, begin = [], 0
        for part in self.parts:
            start, stop = split_evenly(part // self.unit, tp, rank)
            found.append((begin + start * self.unit, begin + stop * self.unit))
            begin += part
        return found

    def local_period(self, tp: int, rank: int) -> int:
        """Size of a rank's share of one period."""
        return sum(stop - start for start, stop in self.ranges(tp, rank))

    def moved(self, dim: int) -> Sharded:
        """The same split on another dim."""
        return Sharded(dim, self.parts, self.unit)

    def scaled(self, up: int, down: int, tp: int) -> Sharded | None:
        """The same split where each element of the dim has become `up / down` elements; None if that cuts elements."""
        if any(part * up % down for part in self.parts):
            return None
        parts = tuple(part * up // down for part in self.parts)
        if self.is_even(tp):
            return sharded(self.dim, parts, tp) if all(part % tp == 0 for part in parts) else None
        return None if self.unit * up % down else sharded(self.dim, parts, tp, self.unit * up // down)

    def blocks(self, size: int) -> tuple[int, ...]:
        """Sizes of all the blocks that fill a dim of `size`."""
        assert size % self.period == 0, (self, size)
        return self.parts * (size // self.period)

    def layout(self, shape: tuple[int, ...], tp: int, rank: int) -> Layout:
        """The share of `rank` of a whole tensor of `shape`."""
        full = Layout.full(shape)
        if self.unit == 1:
            return full.split(self.dim, self.blocks(shape[self.dim]), rank, tp)
        pieces, out = [], 0
        for turn in range(shape[self.dim] // self.period):
            for start, stop in self.ranges(tp, rank):
                whole, local, box = [0] * len(shape), [0] * len(shape), list(shape)
                whole[self.dim], local[self.dim], box[self.dim] = turn * self.period + start, out, stop - start
                pieces.append(Piece(tuple(whole), tuple(local), tuple(box)))
                out += stop - start
        return Layout(shape, (*shape[: self.dim], out, *shape[self.dim + 1 :]), tuple(pieces))

    def __repr__(self) -> str:
        blocks = "+".join(map(str, self.parts))
        return f"sharded({self.dim}: {blocks}{f' by {self.unit}' if self.unit > 1 else ''})"


Placement = Whole | Sharded


def sharded(dim: int, parts: tuple[int, ...], tp: int, unit: int = 1) -> Sharded:
    """A split in normal form: the shortest row of blocks that repeats, and unit 1 where grains need no care."""
    for length in range(1, len(parts)):
        if len(parts) % length == 0 and parts[:length] * (len(parts) // length) == parts:
            parts = parts[:length]
            break
    if unit > 1 and all(part % (unit * tp) == 0 for part in parts):
        unit = 1
    return Sharded(dim, parts, unit)


def refined(source: Sharded, here: Sharded, wish: Sharded, tp: int) -> Sharded | None:
    """The split of a source under which a value made of it, now split as `here`, is split as `wish`.

    The value is the whole source, element by element or in larger ones, or one of the pieces it was cut into.
    """
    count = len(here.parts)
    for first in range(len(source.parts) - count + 1) if count < len(source.parts) else ():
        times, rest = divmod(source.parts[first], here.parts[0])
        if rest == 0 and source.parts[first : first + count] == tuple(part * times for part in here.parts):
            inner = tuple(part * times for part in wish.parts) * (here.period // wish.period)
            parts = source.parts[:first] + inner + source.parts[first + count :]
            return sharded(source.dim, parts, tp) if wish.unit == 1 and here.period % wish.period == 0 else None
    return wish.scaled(source.period, here.period, tp)
