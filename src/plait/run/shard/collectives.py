"""The collectives of tensor parallelism, differentiable.

| call     | forward                    | backward                 | placement                |
|----------|----------------------------|--------------------------|--------------------------|
| `copy`   | nothing                    | all-reduce               | replicated -> copied     |
| `reduce` | all-reduce                 | nothing                  | partial -> replicated    |
| `gather` | all-gather along a dim     | the rank's own slice     | sharded -> replicated    |
| `take`   | the rank's own slice       | all-gather along the dim | replicated -> sharded    |
| `share`  | division by the group size | nothing                  | replicated -> partial    |

Groups are named, not held: a graph that calls these can be copied, and pickled without its process group.
Source: Shoeybi et al. (2019), Megatron-LM, section 3 (`f` is `copy`, `g` is `reduce`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from plait.run.shard.placement import Sharded

__all__ = ["copy", "gather", "group", "reduce", "register", "share", "take"]

_GROUPS: dict[str, dist.ProcessGroup] = {}
"""The only state: process groups by the name that lowered graphs carry."""

Split = tuple[int, tuple[int, ...], int, int, int]
"""(dim, parts, unit, tp, rank): a placement and a place in the group, as plain arguments of a graph node."""


def register(name: str, process_group: dist.ProcessGroup) -> None:
    """Make a process group known under a name."""
    _GROUPS[name] = process_group


def group(name: str) -> dist.ProcessGroup:
    """The process group of that name.

    Raises:
        KeyError: none was registered in this process.
    """
    return _GROUPS[name]


def all_reduce(x: torch.Tensor, name: str, *, fresh: bool = False, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum over the group; in place where `fresh` (and laid out without gaps)."""
    if not x.is_contiguous():
        x = x.contiguous()
    elif not fresh:
        x = x.clone()
    dist.all_reduce(x, op=op, group=_GROUPS[name])
    return x


def cut_out(x: torch.Tensor, split: Split) -> torch.Tensor:
    """The rank's slice of a whole tensor."""
    dim, parts, unit, tp, rank = split
    ranges = Sharded(dim, parts, unit).ranges(tp, rank)
    if len(ranges) == 1 and x.shape[dim] == parts[0]:
        return x.narrow(dim, ranges[0][0], ranges[0][1] - ranges[0][0])
    rows: torch.Tensor = x.unflatten(dim, (-1, sum(parts)))  # type: ignore[no-untyped-call]
    pieces = [rows.narrow(dim + 1, start, stop - start) for start, stop in ranges]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim + 1)).flatten(dim, dim + 1)


def all_gather(x: torch.Tensor, split: Split, name: str) -> torch.Tensor:
    """The whole tensor from the ranks' slices."""
    dim, parts, unit, tp, rank = split
    placement = Sharded(dim, parts, unit)
    is_bool = x.dtype == torch.bool
    x = x.view(torch.uint8) if is_bool else x
    period = placement.local_period(tp, rank)
    turns = x.shape[dim] // period
    lengths = [placement.local_period(tp, r) * turns for r in range(tp)]
    longest = max(lengths)
    if x.shape[dim] < longest:
        # Collectives want equal shapes: shorter slices are filled up, and cut again below.
        missing = list(x.shape)
        missing[dim] = longest - x.shape[dim]
        x = torch.cat([x, x.new_zeros(missing)], dim)
    x = x.contiguous()
    found = [torch.empty_like(x) for _ in range(tp)]
    dist.all_gather(found, x, group=_GROUPS[name])
    slices = [f if n == longest else f.narrow(dim, 0, n) for f, n in zip(found, lengths, strict=True)]
    if turns == 1 and len(parts) == 1:
        whole = torch.cat(slices, dim)
    else:
        rows = [s.unflatten(dim, (turns, -1)) for s in slices]  # type: ignore[no-untyped-call]
        pieces, begin = [], [0] * tp
        for index in range(len(parts)):
            for r in range(tp):
                start, stop = placement.ranges(tp, r)[index]
                pieces.append(rows[r].narrow(dim + 1, begin[r], stop - start))
                begin[r] += stop - start
        whole = torch.cat(pieces, dim + 1).flatten(dim, dim + 1)
    return whole.view(torch.bool) if is_bool else whole


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, fresh: bool) -> torch.Tensor:
        ctx.name, ctx.fresh = name, fresh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_reduce(grad, ctx.name, fresh=ctx.fresh), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, fresh: bool) -> torch.Tensor:
        # In place, but not told to autograd: a matrix product does not save its result, and the history of a write
        # to a view would cost a copy of the gradient.
        summed = all_reduce(x, name, fresh=fresh)
        return summed.view_as(summed) if summed is x else summed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, split: Split, name: str) -> torch.Tensor:
        ctx.split = split
        return all_gather(x, split, name)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return cut_out(grad, ctx.split), None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, split: Split, name: str) -> torch.Tensor:
        ctx.split, ctx.name = split, name
        found = cut_out(x, split)
        return found.view_as(found) if found is x else found

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_gather(grad, ctx.split, ctx.name), None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: int) -> torch.Tensor:
        return x / tp

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def copy(x: torch.Tensor, name: str, fresh: bool = False) -> torch.Tensor:
    """`x` for use in sharded computation: its gradient is summed over the group.

    `fresh` promises that the gradient that arrives is nobody else's, so that it may be summed in place.
    """
    return _Copy.apply(x, name, fresh) if torch.is_grad_enabled() else x  # type: ignore[no-untyped-call]


def reduce(x: torch.Tensor, name: str, fresh: bool = False) -> torch.Tensor:
    """The sum of the group's parts; `fresh` promises that nobody else reads `x`."""
    return _Reduce.apply(x, name, fresh)  # type: ignore[no-any-return, no-untyped-call]


def gather(x: torch.Tensor, split: Split, name: str) -> torch.Tensor:
    """The whole of the group's slices."""
    return _Gather.apply(x, split, name)  # type: ignore[no-any-return, no-untyped-call]


def take(x: torch.Tensor, split: Split, name: str) -> torch.Tensor:
    """The rank's slice; its gradient is gathered."""
    return _Take.apply(x, split, name)  # type: ignore[no-any-return, no-untyped-call]


def share(x: torch.Tensor, tp: int) -> torch.Tensor:
    """An equal part of `x` on each rank, so that the parts sum to it; its gradient is whole already."""
    return _Share.apply(x, tp)  # type: ignore[no-any-return, no-untyped-call]
