"""How far a runtime's outputs are from eager's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

__all__ = ["PARITY", "Difference", "difference"]

PARITY = 1e-5
"""Largest relative error (max over max) at which fp32 counts as equal; the worst seen over six runtimes was 1.2e-6."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Between eager's outputs in fp32 and a runtime's."""

    max_abs: float
    mean_abs: float
    max_rel: float
    """Largest difference over the largest value of the same output; of the worst output."""
    cosine: float
    """Of each floating-point output, flattened; the least of them. Of whole numbers alone: the share that is right."""
    top1: float | None
    """Share of positions where the largest entry of the last dimension is the same, of the first output that has rows; None: none has."""
    worst: str
    """The output with the largest relative error."""
    lost: str = ""
    """Why no precision excuses the worst one: another shape, or values that are not finite where eager's are. Empty where nothing is."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def difference(names: Sequence[str], eager: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """Of all outputs. A wrong shape, a value that is not finite where eager's is, or a wrong whole number is infinite."""
    if len(eager) != len(other):
        raise ValueError(f"{len(other)} outputs, eager has {len(eager)}")
    parts = [_one(e, o) for e, o in zip(eager, other, strict=True)]
    floating = [p for p, e in zip(parts, eager, strict=True) if e.is_floating_point() or e.is_complex()]
    worst = max(range(len(parts)), key=lambda i: (bool(parts[i].lost), parts[i].largest_rel))
    tops = (_top1(e, o) for e, o in zip(eager, other, strict=True))
    return Difference(
        max_abs=max(p.largest for p in parts),
        mean_abs=max(p.mean for p in parts),
        max_rel=parts[worst].largest_rel,
        cosine=min(p.cosine for p in floating or parts),
        top1=next((top for top in tops if top is not None), None),
        worst=names[worst],
        lost=parts[worst].lost,
    )


class _Part(NamedTuple):
    """Of one output."""

    largest: float
    mean: float
    largest_rel: float
    cosine: float
    lost: str = ""


_SAME = _Part(0.0, 0.0, 0.0, 1.0)


def _lost(why: str) -> _Part:
    return _Part(math.inf, math.inf, math.inf, -1.0, why)


def _one(eager: torch.Tensor, other: torch.Tensor) -> _Part:
    import torch

    if eager.shape != other.shape:
        return _lost(f"its shape is {list(other.shape)}, eager's is {list(eager.shape)}")
    if not eager.numel():
        return _SAME
    if eager.is_complex():
        eager, other = (torch.view_as_real(t.resolve_conj()) for t in (eager, other.to(eager.dtype)))
    a, b = eager.detach().double().flatten(), other.detach().double().flatten()
    if not eager.is_floating_point():
        gap = (a - b).abs()
        wrong = float((gap > 0).double().mean())
        return _Part(float(gap.max()), float(gap.mean()), math.inf, 1.0 - wrong) if wrong else _SAME
    finite = torch.isfinite(a)
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))  # infinities of masks, and what is undefined in eager, too
    odd = int((~(same | (finite & torch.isfinite(b)))).sum())
    if odd:
        return _lost(f"{odd} of {a.numel()} values are infinite or NaN where eager's are not, or the other way round")
    a, b = a[finite], b[finite]
    if not a.numel():
        return _SAME
    gap = (a - b).abs()
    scale = float(a.abs().max())
    lengths = float(a.norm() * b.norm())
    cosine = float(a @ b) / lengths if lengths else float(torch.equal(a, b))
    largest = float(gap.max())
    return _Part(largest, float(gap.mean()), largest / scale if scale else (0.0 if not largest else math.inf), cosine)


def _top1(eager: torch.Tensor, other: torch.Tensor) -> float | None:
    if not eager.is_floating_point() or eager.dim() < 2 or eager.shape[-1] < 2 or eager.shape != other.shape:
        return None
    return float((eager.argmax(-1) == other.argmax(-1)).double().mean()) if eager.numel() else None
