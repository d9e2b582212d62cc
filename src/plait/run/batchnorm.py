"""Batch normalisation over the samples of all replicas, and by running statistics while evaluating.

In training, one device normalises over its whole (micro)batch. Here the batch is spread over dp x fsdp, so mean and
variance are summed over that group, forward and backward, weighted by each replica's count; running statistics then
equal one device's. torch's SyncBatchNorm does this for CUDA tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

__all__ = ["BatchNorm", "by_running_statistics", "nothing_counts", "synchronise_batch_norm"]

_COUNTS: ContextVar[bool] = ContextVar("samples_count", default=True)
_EVALUATING: ContextVar[bool] = ContextVar("evaluating", default=False)


@contextmanager
def by_running_statistics() -> Iterator[None]:
    """Within, batch norm uses its running statistics, as in eval mode."""
    token = _EVALUATING.set(True)
    try:
        yield
    finally:
        _EVALUATING.reset(token)


@contextmanager
def nothing_counts(active: bool = True) -> Iterator[None]:
    """Within, this process's samples are stand-ins of an empty share and leave no trace in the statistics."""
    token = _COUNTS.set(not active)
    try:
        yield
    finally:
        _COUNTS.reset(token)


def synchronise_batch_norm(group: dist.ProcessGroup | None) -> Callable[[fx.Node], None]:
    """A rewrite of graph nodes: training-mode `aten.batch_norm` over `group` (None: this process alone)."""

    def rewrite(node: fx.Node) -> None:
        training = 5
        if node.target is torch.ops.aten.batch_norm.default and node.args[training] is True:
            node.target = BatchNorm(group)

    return rewrite


class BatchNorm:
    """Callable in place of aten.batch_norm, with a name for the generated code."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.__name__ = self.__qualname__ = "synchronised_batch_norm"
        self.__module__ = __name__

    def __deepcopy__(self, memo: Any) -> BatchNorm:
        return self

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        training: bool,  # noqa: ARG002  aten.batch_norm's arguments
        momentum: float,
        eps: float,
        cudnn: bool,
    ) -> torch.Tensor:
        """x: [N, C, ...]; normalised per channel over every other dim and over the group."""
        evaluating = _EVALUATING.get() and running_mean is not None
        if evaluating or self._group is None:
            plain: torch.Tensor = torch.ops.aten.batch_norm.default(
                x, weight, bias, running_mean, running_var, not evaluating, momentum, eps, cudnn
            )
            return plain
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        counts = float(_COUNTS.get())
        count = x.new_tensor([x.numel() / x.shape[1] * counts])
        total = _SumOverGroup.apply(torch.cat([x.sum(dims) * counts, count]), self._group)  # type: ignore[no-untyped-call]
        n = total[-1].detach().clamp(min=1.0)
        mean = total[:-1] / n
        # A second pass over centred values: one all-reduce more, but no cancellation where the mean is large.
        centred: torch.Tensor = x - mean.view(shape)
        variance = _SumOverGroup.apply((centred * centred).sum(dims) * counts, self._group) / n  # type: ignore[no-untyped-call]
        with torch.no_grad():
            if running_mean is not None and running_var is not None and float(total[-1]) > 0:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                unbiased = variance * (n / (n - 1).clamp(min=1.0))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        out: torch.Tensor = centred * torch.rsqrt(variance + eps).view(shape)
        if weight is not None:
            out = out * weight.view(shape)
        return out if bias is None else out + bias.view(shape)


class _SumOverGroup(torch.autograd.Function):
    """All-reduce whose gradient is an all-reduce: every process uses the sum for its own samples."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
