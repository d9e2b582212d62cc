"""Where a decoder's own results at earlier positions change with what follows them, so that no cache can hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from plait.capture.inline import inline_regions
from plait.serve.decoding.positions import EXACT, Positions, kind_of, line_of

__all__ = ["looks_ahead"]

_CHANGED = 1e-3
"""Difference over the largest value from which on it is no rounding: sums over other lengths round differently."""


def looks_ahead(program: torch.export.ExportedProgram, tokens: torch.Tensor, capacity: int, shortest: int = 2) -> str:
    """The first operator whose rows change when the second half of `tokens` is cut off, with the user's line; empty: none.

    Results are compared that hold one dim of positions and follow from the tokens.
    """
    module: Any = program.module(check_guards=False)
    inline_regions(module)
    source = Positions(module, capacity, shortest)
    half = max(shortest, tokens.shape[1] // 2)
    whole = _Rows(source, half)
    whole.run(tokens)
    part = _Rows(source, half, whole.rows)
    part.run(tokens[:, :half].contiguous())
    if part.changed is None:
        return ""
    return f"{part.changed.target}\n\n  {line_of(part.changed)}"


class _Rows(fx.Interpreter):
    """Runs the graph and keeps, or compares, the first rows of every result."""

    def __init__(self, source: Positions, count: int, known: dict[fx.Node, torch.Tensor] | None = None) -> None:
        super().__init__(source.module)
        self._source, self._count, self._known = source, count, known
        self.rows: dict[fx.Node, torch.Tensor] = {}
        self.changed: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """One operator."""
        value = super().run_node(n)
        if "empty" in kind_of(n) and isinstance(value, torch.Tensor):
            value.zero_()  # memory as it is found would differ from run to run
        dims = self._source.dims(n)
        is_rows = isinstance(value, torch.Tensor) and value.is_floating_point() and list(dims.values()) == [EXACT]
        if n not in self._source.data or not is_rows:
            return value
        rows = value.narrow(next(iter(dims)), 0, self._count)
        if self._known is None:
            self.rows[n] = rows.clone()
        elif self.changed is None and _differ(rows, self._known[n]):
            self.changed = n
        return value


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return True
    finite = torch.isfinite(one) & torch.isfinite(other)
    difference, largest = (one - other)[finite].abs(), other[finite].abs()
    return bool(difference.numel() and difference.max() > _CHANGED * largest.max())
