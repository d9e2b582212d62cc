"""Which part of a whole tensor a process holds, and where in its local tensor each piece of it lies.

Tensor parallelism, FSDP and checkpoints all speak of shards in these terms, so that
initial values, comparison with one device and files need one description only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Layout", "Piece", "split_evenly"]


def split_evenly(size: int, count: int, index: int) -> tuple[int, int]:
    """(start, stop) of part `index` when `size` is cut into `count` parts, the first ones larger (as torch.tensor_split)."""
    base, extra = divmod(size, count)
    start = index * base + min(index, extra)
    return start, start + base + (1 if index < extra else 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box that is contiguous both in the whole tensor and in the local one."""

    whole: tuple[int, ...]
    """Offsets in the whole tensor, one per dim."""
    local: tuple[int, ...]
    """Offsets in the local tensor, one per dim."""
    size: tuple[int, ...]

    def in_whole(self) -> tuple[slice, ...]:
        """Index of the box in the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.whole, self.size, strict=True))

    def in_local(self) -> tuple[slice, ...]:
        """Index of the box in the local tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.local, self.size, strict=True))


@dataclass(frozen=True, slots=True)
class Layout:
    """A process's share of one tensor."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    local_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def full(cls, shape: tuple[int, ...]) -> Layout:
        """All of it."""
        zero = (0,) * len(shape)
        return cls(tuple(shape), tuple(shape), (Piece(zero, zero, tuple(shape)),))

    @property
    def is_full(self) -> bool:
        """Whether the local tensor is the whole one."""
        return self.local_shape == self.shape and len(self.pieces) == 1

    def split(self, dim: int, parts: tuple[int, ...], index: int, count: int) -> Layout:
        """The share left when local dim `dim`, a row of blocks of sizes `parts`, is cut and each block is split by itself.

        `parts` add up to the local size of `dim`; `(size,)` is a plain split. Fused projections
        (queries, keys and values in one matrix) need a split of each block.
        """
        assert sum(parts) == self.local_shape[dim], (parts, dim, self.local_shape)
        pieces: list[Piece] = []
        begin, out = 0, 0
        for part in parts:
            start, stop = split_evenly(part, count, index)
            pieces += self._cut(dim, begin + start, begin + stop, out)
            begin += part
            out += stop - start
        local_shape = (*self.local_shape[:dim], out, *self.local_shape[dim + 1 :])
        return Layout(self.shape, local_shape, tuple(pieces))

    def rows(self, start: int, stop: int) -> Layout:
        """The share left when only local rows `start:stop` of dim 0 are kept (FSDP's shard)."""
        start, stop = min(start, self.local_shape[0]), min(stop, self.local_shape[0])
        return Layout(self.shape, (stop - start, *self.local_shape[1:]), tuple(self._cut(0, start, stop, 0)))

    def _cut(self, dim: int, start: int, stop: int, out: int) -> list[Piece]:
        found = []
        for piece in self.pieces:
            low, high = max(start, piece.local[dim]), min(stop, piece.local[dim] + piece.size[dim])
            if low >= high:
                continue
            whole, local, size = list(piece.whole), list(piece.local), list(piece.size)
            whole[dim] += low - piece.local[dim]
            local[dim] = out + low - start
            size[dim] = high - low
            found.append(Piece(tuple(whole), tuple(local), tuple(size)))
        return found

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """A new local tensor with this share of `whole`."""
        if self.is_full:
            return whole.detach().clone()
        local = whole.new_empty(self.local_shape)
        for piece in self.pieces:
            local[piece.in_local()] = whole[piece.in_whole()]
        return local

    def put(self, local: torch.Tensor, whole: torch.Tensor) -> None:
        """Write the local tensor into its place in `whole`."""
        for piece in self.pieces:
            whole[piece.in_whole()] = local[piece.in_local()]
