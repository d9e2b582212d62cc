"""Operators that a runtime says it lacks, spelled in others, and tried again.

    convert(program) ──fails, its error names operators of the program──▶ each by a function below, else by torch's own
         ▲                                                                decomposition of it ──▶ the program exported again
         └────────────────────────────────────────────────────────────────────────────────────────────┘

What a runtime has is left as it is: its own kernel is quicker than a spelling in many.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from plait.serve.blame import blame, kind_of, operators_in
from plait.serve.runtimes.spelled import SORTING, spelled

__all__ = ["LACKING", "VOLUMES", "converted"]

Result = TypeVar("Result")
_ROUNDS = 16  # spelled in others, an operator may need some that are lacking, too


def converted(
    convert: Callable[[torch.export.ExportedProgram], Result], program: torch.export.ExportedProgram
) -> Result:
    """convert(program), with what its errors name spelled otherwise as long as that gets on.

    Raises:
        Exception: what stopped it: the last error if it names an operator of the program as it was, else the first.
    """
    given = program
    tried: set[str] = set()
    problems: list[Exception] = []
    for _ in range(_ROUNDS):
        try:
            return convert(program)
        except Exception as problem:
            problems.append(problem)
            try:
                other = _respelled(problem, program, tried)
            except Exception:  # it cannot be exported so: then the runtime's own word is the one that counts
                break
            if other is None:
                break
            program = other
    raise problems[-1] if blame(_texts(problems[-1])[-1], given) is not None else problems[0]


def _respelled(
    problem: Exception, program: torch.export.ExportedProgram, tried: set[str]
) -> torch.export.ExportedProgram | None:
    """The program without what the error names; None where there is no other way, or it was tried."""
    others = _others(problem, program)
    if not others:  # what is written in place (index_add_) is named as what it is without that
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program.run_decompositions({})
        others = _others(problem, program)
    if not others and any(operators_in(text) for text in _texts(problem)):
        # It is stuck at a part of its own decomposition of something (prims.prod, of cumprod): of what, is not said.
        kinds = {str(node.target) for node in program.graph.nodes}
        others = {name: function for name, function in LACKING.items() if name in kinds}
    others = {name: function for name, function in others.items() if name not in tried}
    tried |= set(others)
    return spelled(program, others) if others else None


def _others(problem: Exception, program: torch.export.ExportedProgram) -> dict[str, Callable[..., Any]]:
    """A function for each operator of the program that the error names; from its cause outwards, the first that names any."""
    for text in reversed(_texts(problem)):
        named = operators_in(text)
        found = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and kind_of(node) in named:
                other = _other(node.target)
                if other is not None:
                    found[str(node.target)] = other
        if found:
            return found
    return {}


def _texts(problem: BaseException | None) -> list[str]:
    """Of an error and its causes, the innermost last."""
    found = []
    while problem is not None:
        found.append(str(problem))
        problem = problem.__cause__ or problem.__context__
    return found


def _other(operator: Any) -> Callable[..., Any] | None:
    from torch._decomp import decomposition_table

    if str(operator) in LACKING:
        return LACKING[str(operator)]
    if getattr(getattr(operator, "_schema", None), "is_mutable", True):
        return None  # written in place
    if operator in decomposition_table:
        return decomposition_table[operator]
    can = getattr(operator, "_can_decompose", None)
    return operator.decompose if can is not None and can() else None


def adaptive_average(x: torch.Tensor, size: Any) -> torch.Tensor:
    """[..., I1, I2, ...] -> [..., O1, O2, ...]: the mean of each of O nearly equal windows, as adaptive_avg_poolNd has them."""
    for i, out in enumerate(size, x.dim() - len(size)):
        if out is None or out == x.shape[i]:
            continue
        inn = x.shape[i]
        place, window = torch.arange(inn, device=x.device), torch.arange(out, device=x.device)
        start, stop = (window * inn) // out, ((window + 1) * inn + out - 1) // out
        inside = (place[None, :] >= start[:, None]) & (place[None, :] < stop[:, None])
        weights = inside.to(x.dtype) / (stop - start)[:, None].to(x.dtype)
        x = torch.matmul(x.transpose(i, -1), weights.transpose(0, 1)).transpose(i, -1)
    return x


def windows(x: torch.Tensor, dim: int, size: int, step: int) -> torch.Tensor:
    """aten.unfold: windows of `size` along `dim`, every `step`; they are the new last dimension."""
    dim %= x.dim()
    count = (x.shape[dim] - size) // step + 1
    index = torch.arange(count, device=x.device)[:, None] * step + torch.arange(size, device=x.device)[None, :]
    found = torch.index_select(x, dim, index.reshape(-1))
    return found.reshape(*x.shape[:dim], count, size, *x.shape[dim + 1 :]).movedim(dim + 1, -1)


def indices_added(
    x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, *, alpha: float = 1
) -> torch.Tensor:
    """aten.index_add, by a matrix that says which row of the source goes where."""
    place = torch.arange(x.shape[dim], device=x.device)
    goes = (place[:, None] == index.reshape(-1)[None, :]).to(source.dtype) * alpha
    return x + torch.matmul(source.transpose(dim, -1), goes.transpose(0, 1)).transpose(dim, -1)


def distances(a: torch.Tensor, b: torch.Tensor, p: float = 2.0, *_: Any) -> torch.Tensor:
    """aten.cdist: [..., P, M], [..., R, M] -> [..., P, R], the p-norm of every difference."""
    gap = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == 0:
        return (gap != 0).to(a.dtype).sum(-1)
    if p == float("inf"):
        return gap.amax(-1)
    if p == 1:
        return gap.sum(-1)
    return (gap * gap).sum(-1).sqrt() if p == 2 else gap.pow(p).sum(-1).pow(1 / p)


def largest_of_volumes(
    x: torch.Tensor, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> torch.Tensor:
    """aten.max_pool3d of [B, C, T, H, W]: the largest of each picture, then of its largest over time."""
    (size_t, *size_hw), (pad_t, *pad_hw), (far_t, *far_hw) = (_three(v) for v in (size, padding, dilation))
    step_t, *step_hw = _three(stride or size)
    pool = torch.nn.functional.max_pool2d
    batch, channels, time = x.shape[:3]
    flat = pool(x.reshape(batch, -1, *x.shape[3:]), size_hw, step_hw, pad_hw, far_hw, ceil_mode)
    height, width = flat.shape[2:]
    flat = flat.reshape(batch, channels, time, height * width)
    flat = pool(flat, (size_t, 1), (step_t, 1), (pad_t, 0), (far_t, 1), ceil_mode)
    return flat.reshape(batch, channels, flat.shape[2], height, width)


def volumes_convolved(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """aten.conv3d of [B, C, T, H, W], by a convolution of pictures for each step of the kernel in time, added up."""
    (step_t, *step_hw), (pad_t, *pad_hw), (far_t, *far_hw) = (_three(v) for v in (stride, padding, dilation))
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, pad_t, pad_t))
    times = (x.shape[2] - far_t * (weight.shape[2] - 1) - 1) // step_t + 1
    total = None
    for k in range(weight.shape[2]):
        start = k * far_t
        part = x[:, :, start : start + (times - 1) * step_t + 1 : step_t].transpose(1, 2)
        part = part.reshape(-1, *part.shape[2:])
        y = torch.nn.functional.conv2d(part, weight[:, :, k], None, step_hw, pad_hw, far_hw, groups)
        total = y if total is None else total + y
    assert total is not None
    found = total.reshape(-1, times, *total.shape[1:]).transpose(1, 2)
    return found if bias is None else found + bias.reshape(-1, 1, 1, 1)


def _three(value: Any) -> tuple[int, ...]:
    given: tuple[int, ...] = (value,) if isinstance(value, int) else tuple(value)
    return given * 3 if len(given) == 1 else given


def limited(x: torch.Tensor, low: Any = None, high: Any = None) -> torch.Tensor:
    """aten.clamp with limits of the tensor's own kind of number."""
    kind = float if x.is_floating_point() else int
    if low is not None:
        x = torch.maximum(x, torch.full((), kind(low), dtype=x.dtype, device=x.device))
    return x if high is None else torch.minimum(x, torch.full((), kind(high), dtype=x.dtype, device=x.device))


def sorted_stably(
    x: torch.Tensor, *, dim: int = -1, descending: bool = False, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """aten.sort.stable where the runtime's own sorting is stable: ONNX's TopK gives the earlier of two equal values first."""
    found = torch.topk(x, x.shape[dim], dim, descending, True)
    return found.values, found.indices


def products(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """aten.cumprod, in n x n products."""
    x = x.to(dtype or (x.dtype if x.is_floating_point() else torch.int64))
    place = torch.arange(x.shape[dim], device=x.device)
    upto = place[None, :] <= place[:, None]
    rows = x.transpose(dim, -1).unsqueeze(-2)
    return torch.where(upto, rows, torch.ones_like(rows)).prod(-1).transpose(dim, -1)


def middle(x: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """aten.median.dim: the lower one of two in the middle."""
    values, indices = torch.sort(x, dim)
    place = (x.shape[dim] - 1) // 2
    found = (values.narrow(dim, place, 1), indices.narrow(dim, place, 1))
    return found if keepdim else (found[0].squeeze(dim), found[1].squeeze(dim))


def towards_zero(x: torch.Tensor) -> torch.Tensor:
    """aten.trunc."""
    return x.sign() * x.abs().floor() if x.is_floating_point() else x


def fraction(x: torch.Tensor) -> torch.Tensor:
    """aten.frac."""
    return x - towards_zero(x)


def rest(x: torch.Tensor, by: Any) -> torch.Tensor:
    """aten.fmod, which has the sign of x."""
    return x - by * towards_zero(x / by) if x.is_floating_point() else x.sign() * torch.remainder(x.abs(), abs(by))


def buckets(x: torch.Tensor, limits: torch.Tensor, *, out_int32: bool = False, right: bool = False) -> torch.Tensor:
    """aten.bucketize: how many limits lie below each value, or at it with `right`."""
    below = limits <= x.unsqueeze(-1) if right else limits < x.unsqueeze(-1)
    return below.to(torch.int32 if out_int32 else torch.int64).sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def hypotenuse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """aten.hypot."""
    return (a * a + b * b).sqrt()


LACKING: Mapping[str, Callable[..., Any]] = {
    **SORTING,
    "aten.adaptive_avg_pool1d.default": adaptive_average,
    "aten.adaptive_avg_pool2d.default": adaptive_average,
    "aten.adaptive_avg_pool3d.default": adaptive_average,
    "aten.max_pool3d.default": largest_of_volumes,
    "aten.unfold.default": windows,
    "aten.index_add.default": indices_added,
    "aten.cdist.default": distances,
    "aten.clamp.default": limited,
    "aten.hypot.default": hypotenuse,
    "aten.sort.stable": sorted_stably,
    "aten.cumprod.default": products,
    "aten.median.dim": middle,
    "aten.trunc.default": towards_zero,
    "aten.bucketize.Tensor": buckets,
    "aten.frac.default": fraction,
    "aten.fmod.Tensor": rest,
    "aten.fmod.Scalar": rest,
}
"""Before torch's own decompositions, which are written for compilers."""

VOLUMES: Mapping[str, Callable[..., Any]] = {"aten.conv3d.default": volumes_convolved}
"""For a runtime whose convolution takes three dimensions and fails only when it runs."""
