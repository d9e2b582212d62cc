"""Writing to places that values decide (x[i] = v), for runtimes whose own way of it fails: each place looks for its writer.

n x m comparisons for n places and m values. Of several writers of one place the last wins, where torch leaves it open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from plait.serve.runtimes.spelled import spelled

__all__ = ["put", "without_scattering"]


def put(
    x: torch.Tensor, indices: Sequence[torch.Tensor | None], values: torch.Tensor, accumulate: bool = False
) -> torch.Tensor:
    """aten.index_put of whole numbers in one dimension, in which `x` has at least one place; anything else is left to torch."""
    first = indices[0]
    is_simple = len(indices) == 1 and first is not None and first.dim() == 1 and first.dtype != torch.bool
    if not is_simple or first is None or accumulate:
        return torch.index_put(x, tuple(indices), values, accumulate)
    places = torch.arange(x.shape[0], device=x.device)
    wanted = torch.where(first < 0, first + x.shape[0], first)
    order = torch.arange(1, wanted.shape[0] + 1, device=x.device)
    writer = torch.where(wanted[None, :] == places[:, None], order[None, :], torch.zeros_like(order)[None, :]).amax(1)
    spread = values.to(x.dtype).expand(wanted.shape[0], *x.shape[1:])
    written = torch.index_select(spread, 0, (writer - 1).clamp(min=0))
    is_written = (writer > 0).reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(is_written, written, x)


def without_scattering(
    program: torch.export.ExportedProgram, further: Mapping[str, Callable[..., Any]] | None = None
) -> torch.export.ExportedProgram:
    """The program with `put` for its writing, and the operators of `further` by functions (as `spelled` has them).

    Writing in place is first made writing into a copy, so that whatever reads the same memory later reads the copy.
    """
    names = {str(node.target) for node in program.graph.nodes}
    if names & {"aten.index_put.default", "aten.index_put_.default"}:
        program = program.run_decompositions({})
    return spelled(program, {"aten.index_put.default": put, **(further or {})})
