"""Torch's operators in terms that TVM's importer and compiler do well, for `simplified`.

gelu, sigmoid, silu         what TVM computes in vectors, where by their own names they call the C library for every number
index                       whose shape its importer gets wrong
floor_divide                by a number, to which it gives another type
clamp                       of whole numbers with one limit, for which it takes infinity as the other
group_norm                  whose sums no schedule of its space can be drawn for
conv_transpose2d            which it does not lower in the layout that the other convolutions are quick in
amax, amin, any, min        which it has no name for
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["SPELLED"]


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    import torch

    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + torch.erf(x * 0.7071067811865476))


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    import torch

    return 1 / (1 + torch.exp(-x))


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * _sigmoid(x)


def _index(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """x[:, i, j]: of whole numbers for neighbouring dimensions, by one lookup in those dimensions laid together."""
    import torch

    spread: Any = torch.broadcast_tensors
    places = [place for place, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    is_block = places == list(range(places[0], places[0] + len(places)))
    if not is_block or any(index.dtype not in (torch.int64, torch.int32) for index in given):
        return torch.ops.aten.index.Tensor(x, indices)  # type: ignore[no-any-return]
    first, last = places[0], places[-1]
    together = torch.zeros((), dtype=torch.int64)
    for place, index in zip(places, spread(*given), strict=True):
        size = x.shape[place]
        together = together * size + torch.where(index < 0, index + size, index)
    found = x.flatten(first, last).index_select(first, together.reshape(-1))
    return found.reshape(*x.shape[:first], *together.shape, *x.shape[last + 1 :])


def _floor_divide(x: torch.Tensor, divisor: Any) -> torch.Tensor:
    import torch

    is_number = not isinstance(divisor, torch.Tensor)
    return torch.floor_divide(x, torch.full((1,), divisor, dtype=x.dtype) if is_number else divisor)


def _amax(x: torch.Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> torch.Tensor:
    import torch

    for place in sorted((d % x.dim() for d in dim or range(x.dim())), reverse=True):
        x = torch.max(x, place, keepdim=keepdim).values
    return x


def _amin(x: torch.Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> torch.Tensor:
    return -_amax(-x, dim, keepdim)


def _clamp(x: torch.Tensor, min: Any = None, max: Any = None) -> torch.Tensor:  # noqa: A002  torch's own names
    """Of whole numbers with a limit on one side only: TVM takes infinity for the other one."""
    import torch

    from plait.serve.runtimes.lacking import limited

    return torch.clamp(x, min, max) if x.is_floating_point() else limited(x, min, max)


def _any(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).any(0)


def _least(x: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    values, indices = torch.max(-x, dim, keepdim=keepdim)
    return -values, indices


def _group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> torch.Tensor:
    import torch

    groups = x.reshape(x.shape[0], num_groups, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    found = (centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)).reshape(x.shape)
    channels = (1, x.shape[1], *[1] * (x.dim() - 2))
    found = found if weight is None else found * weight.reshape(channels)
    return found if bias is None else found + bias.reshape(channels)


def _conv_transpose2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> torch.Tensor:
    """A convolution of the values with zeros between and around them, by the weight turned around."""
    import torch

    strides, paddings, more, dilations = (_two(value) for value in (stride, padding, output_padding, dilation))
    for dim in (2, 3):
        x = _apart(x, dim, strides[dim - 2])
    around: list[int] = []
    for dim in (3, 2):
        reach = dilations[dim - 2] * (weight.shape[dim] - 1) - paddings[dim - 2]
        around += [reach, reach + more[dim - 2]]
    x = torch.nn.functional.pad(x, around)
    turned = weight.flip(2, 3).reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return torch.conv2d(x, turned, bias, 1, 0, dilations, groups)


def _two(value: Sequence[int]) -> list[int]:
    return list(value) * (3 - len(value))


def _apart(x: torch.Tensor, dim: int, step: int) -> torch.Tensor:
    """With step - 1 zeros between neighbours."""
    import torch

    if step == 1:
        return x
    size = x.shape[dim]
    spread = torch.nn.functional.pad(x.unsqueeze(dim + 1), [0, 0] * (x.dim() - 1 - dim) + [0, step - 1])
    return spread.flatten(dim, dim + 1).narrow(dim, 0, (size - 1) * step + 1)


SPELLED: dict[str, Callable[..., Any]] = {
    "aten.amax.default": _amax,
    "aten.amin.default": _amin,
    "aten.any.default": _any,
    "aten.clamp.default": _clamp,
    "aten.conv_transpose2d.input": _conv_transpose2d,
    "aten.min.dim": _least,
    "aten.floor_divide.default": _floor_divide,
    "aten.group_norm.default": _group_norm,
    "aten.gelu.default": _gelu,
    "aten.sigmoid.default": _sigmoid,
    "aten.silu.default": _silu,
    "aten.index.Tensor": _index,
}
