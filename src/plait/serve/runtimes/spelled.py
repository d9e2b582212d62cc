"""Operators that no runtime knows, spelled in those that all know.

A custom operator of a library is a name for its Python code, which export does not look into; ATen has a few that only
torch's own devices implement. Each is replaced in the exported program by a function with the same result.

    operator                                what it is                                      here
    transformers.grouped_mm_fallback,       rows of x in groups, each group times a         every row times every matrix,
    aten._grouped_mm                        matrix of its own (experts)                     then each row's own is picked
    aten.histc                              how many values lie in each bin                 comparisons, added up
    aten.diff                               neighbours subtracted                           two slices
    aten.__and__, aten.__or__               bitwise                                         aten.bitwise_and, aten.bitwise_or
    aten.new_ones, aten.empty_like                                                          aten.full, aten.zeros_like
    aten.detach_, aten.lift_fresh_copy      what torch.tensor(...) in a forward is made by  aten.detach, aten.clone
    aten.view                               a reshape that copies nothing                   aten.reshape: a runtime lays tensors
                                                                                            out as it likes
    attention, reshaped                     torch's kernel lays its result out so that      a copy after it
                                            turning it back and reshaping copies nothing;
                                            what a runtime computes instead does not

For a runtime that has no sorting (`SORTING`), which the others need not pay for:

    aten.sort, aten.argsort                                                         each value's place is counted: n x n comparisons
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from plait.serve.runtimes.casting import open_dims

__all__ = ["SORTING", "counts", "differences", "grouped_product", "sorted_by_counting", "spelled"]


def grouped_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, *_: Any) -> torch.Tensor:
    """[S, K] x [E, K, N] -> [S, N]: rows ends[e-1] to ends[e] times weights[e]; rows after the last end are zero.

    It multiplies E times as much as is needed. Picking each row's matrix first would multiply no more than needed, and copy
    K x N numbers a row.
    """
    place = torch.arange(rows.shape[0], device=rows.device)
    group = (place[:, None] >= ends[None, :]).sum(1)
    every = torch.matmul(rows[None], weights)
    last = weights.shape[0] - 1
    index = group.clamp(max=last)[None, :, None].expand(1, every.shape[1], every.shape[2])
    picked = torch.gather(every, 0, index)[0]
    return torch.where((group <= last)[:, None], picked, torch.zeros_like(picked))


def counts(x: torch.Tensor, bins: int = 100, low: float = 0, high: float = 0) -> torch.Tensor:
    """aten.histc with limits: the last bin holds its upper limit, too; what lies outside is not counted."""
    if not low < high:
        return torch.histc(x, bins, low, high)  # limits that the values decide
    flat = x.reshape(-1)
    index = ((flat - low) / (high - low) * bins).floor().clamp(max=bins - 1)
    inside = (flat >= low) & (flat <= high)
    hits = (index[:, None] == torch.arange(bins, device=x.device)[None, :]) & inside[:, None]
    return hits.sum(0).to(x.dtype)


def differences(
    x: torch.Tensor,
    n: int = 1,
    dim: int = -1,
    prepend: torch.Tensor | None = None,
    append: torch.Tensor | None = None,
) -> torch.Tensor:
    """aten.diff."""
    x = torch.cat([part for part in (prepend, x, append) if part is not None], dim)
    for _ in range(n):
        later, earlier = x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, 0, x.shape[dim] - 1)
        x = later ^ earlier if x.dtype == torch.bool else later - earlier
    return x


def ones(like: torch.Tensor, size: Any, *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    """aten.new_ones."""
    return torch.full(size, 1, dtype=dtype or like.dtype)


def sorted_by_counting(x: torch.Tensor, dim: int = -1, descending: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """aten.sort: values and indices, equal ones in the order they come, NaN as the largest."""
    if x.dim() == 0:
        return x.clone(), torch.zeros((), dtype=torch.int64, device=x.device)
    rows = x.transpose(dim, -1)
    place = torch.arange(rows.shape[-1], device=x.device)
    mine, other = rows.unsqueeze(-1), rows.unsqueeze(-2)
    if x.is_floating_point():
        mine_nan, other_nan = torch.isnan(mine), torch.isnan(other)
        less, more = (other < mine) | (mine_nan & ~other_nan), (other > mine) | (other_nan & ~mine_nan)
        before = more if descending else less
        same = (other == mine) | (mine_nan & other_nan)
    else:
        before, same = (other > mine) if descending else (other < mine), other == mine
    ranks = (before | (same & (place[None, :] < place[:, None]))).to(torch.int64).sum(-1)
    is_there = ranks.unsqueeze(-2) == place[:, None]
    indices = torch.where(is_there, place, torch.zeros_like(place)).sum(-1)
    return torch.gather(rows, -1, indices).transpose(dim, -1), indices.transpose(dim, -1)


def _sort_stable(x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options.pop("stable", None)
    return sorted_by_counting(x, **options)


def _argsort(x: torch.Tensor, dim: int = -1, descending: bool = False) -> torch.Tensor:
    return sorted_by_counting(x, dim, descending)[1]


def _argsort_stable(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return _sort_stable(x, **options)[1]


SORTING: Mapping[str, Callable[..., Any]] = {
    "aten.sort.default": sorted_by_counting,
    "aten.sort.stable": _sort_stable,
    "aten.argsort.default": _argsort,
    "aten.argsort.stable": _argsort_stable,
}
"""Operators of sorting by functions; for `spelled`."""


def laid_out_attention(*arguments: Any, **options: Any) -> torch.Tensor:
    """Attention whose result lies in memory as its shape says."""
    found = torch.ops.aten.scaled_dot_product_attention.default(*arguments, **options)
    return torch.clone(found, memory_format=torch.contiguous_format)


_BY_NAME: dict[str, Callable[..., torch.Tensor]] = {
    "transformers.grouped_mm_fallback.default": grouped_product,
    "aten._grouped_mm.default": grouped_product,
    "aten.histc.default": counts,
    "aten.diff.default": differences,
    "aten.new_ones.default": ones,
}
_ATTENTION = "aten.scaled_dot_product_attention.default"
_VIEWS = {torch.ops.aten.transpose.int, torch.ops.aten.permute.default}
_RESHAPES = {torch.ops.aten.reshape.default, torch.ops.aten.view.default, torch.ops.aten.flatten.using_ints}


def _spelling(node: torch.fx.Node, further: Mapping[str, Callable[..., Any]]) -> Callable[..., Any] | None:
    if str(node.target) == _ATTENTION:
        return laid_out_attention if _is_reshaped(node) else None
    name = str(node.target)
    return _BY_NAME.get(name) or further.get(name)


def _is_reshaped(node: torch.fx.Node) -> bool:
    """Whether a reshape takes the node's result as it lies in memory, turned or not."""
    return any(user.target in _RESHAPES or (user.target in _VIEWS and _is_reshaped(user)) for user in node.users)


def spelled(
    program: torch.export.ExportedProgram, further: Mapping[str, Callable[..., Any]] | None = None
) -> torch.export.ExportedProgram:
    """The program without the operators above and those of `further`; the same one where it has none of them."""
    further = further or {}
    aten = torch.ops.aten
    # Operators that take the same arguments and give as much or more.
    swapped: dict[Any, Any] = {
        aten.view.default: aten.reshape.default,
        aten.empty_like.default: aten.zeros_like.default,
        aten.__and__.Tensor: aten.bitwise_and.Tensor,
        aten.__or__.Tensor: aten.bitwise_or.Tensor,
        aten.detach_.default: aten.detach.default,
        aten.lift_fresh_copy.default: aten.clone.default,
    }
    for part in program.graph_module.modules():  # branches of torch.cond are parts of their own
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.target = swapped.get(node.target, node.target) if node.op == "call_function" else node.target
            part.recompile()
    if not any(_spelling(node, further) for node in program.graph.nodes):
        return program
    module: Any = program.module(check_guards=False)
    for node in module.graph.nodes:
        node.target = _spelling(node, further) or node.target
    module.recompile()
    inputs: Any = program.example_inputs
    with torch.no_grad():
        return torch.export.export(module, inputs[0], dynamic_shapes=open_dims(program), strict=False)
