"""Gradients of replicas, summed in buckets while the backward still runs.

Gradients live as views in flat buckets, in the reverse of the order the parameters are used, which is the order the
backward fills them. When the last microbatch has filled a bucket, its all-reduce starts. The losses carry the weights,
so gradients are summed, not averaged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["BUCKET_BYTES", "Reducer"]

BUCKET_BYTES = 25 * 2**20
"""torch DDP's default (`bucket_cap_mb`)."""


class _Bucket:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        self.views = []
        start = 0
        for p in parameters:
            self.views.append(self.flat[start : start + p.numel()].view(p.shape))
            start += p.numel()
        self.waiting = 0
        self.work: dist.Work | None = None


class Reducer:
    """Sums the gradients of `parameters` over `group`.

    Every one of them gets a gradient in the backward, unless `all_used` is False:
    then a parameter that no process used in a step ends without one. `uses` are the stages of this process that a
    parameter is in, where more than one. `begin(backwards)` before a step: how many backwards each stage will run; `finish()` after it.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup,
        *,
        overlap: bool = True,
        all_used: bool = True,
        uses: dict[nn.Parameter, int] | None = None,
    ) -> None:
        self._group = group
        self._overlap = overlap
        self._all_used = all_used
        self._uses = uses or {}
        self._buckets = self._fill([p for p in parameters if p.requires_grad])
        self._counts: dict[nn.Parameter, int] = {}
        self._backwards = 1
        for bucket in self._buckets:
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(self._hook(bucket))  # type: ignore[no-untyped-call]

    @staticmethod
    def _fill(parameters: list[nn.Parameter]) -> list[_Bucket]:
        rows: list[list[nn.Parameter]] = []
        size = 0
        # The first bucket is small, so that the first all-reduce starts early (as torch DDP does).
        limit = 2**20
        for p in reversed(parameters):
            nbytes = p.numel() * p.element_size()
            if not rows or size + nbytes > limit or rows[-1][0].dtype != p.dtype or rows[-1][0].device != p.device:
                limit = BUCKET_BYTES if rows else limit
                rows.append([])
                size = 0
            rows[-1].append(p)
            size += nbytes
        return [_Bucket(row) for row in rows]

    def begin(self, backwards: int) -> None:
        """Zero the gradients, which are views of the buckets from here on."""
        self._backwards = backwards
        self._counts.clear()
        for bucket in self._buckets:
            bucket.flat.zero_()
            bucket.waiting = len(bucket.parameters)
            bucket.work = None
            for p, view in zip(bucket.parameters, bucket.views, strict=True):
                p.grad = view

    def _hook(self, bucket: _Bucket):  # type: ignore[no-untyped-def]
        def arrived(parameter: torch.Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)
            count = self._counts.get(parameter, 0) + 1
            self._counts[parameter] = count
            if count == self._backwards * self._uses.get(parameter, 1):
                bucket.waiting -= 1
                if bucket.waiting == 0 and self._overlap:
                    self._start(bucket)

        return arrived

    def _start(self, bucket: _Bucket) -> None:
        for p, view in zip(bucket.parameters, bucket.views, strict=True):
            if p.grad is not view and p.grad is not None:
                # Autograd replaced the view (it may, for a first gradient); bring the value home.
                view.copy_(p.grad)
                p.grad = view
        bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)

    def finish(self) -> None:
        """Wait for the sums; buckets that never filled are reduced now, in the same order everywhere."""
        for bucket in self._buckets:
            if bucket.work is None:
                self._start(bucket)
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
        if not self._all_used:
            self._drop_unused()

    def _drop_unused(self) -> None:
        parameters = [p for bucket in self._buckets for p in bucket.parameters]
        used = torch.tensor([self._counts.get(p, 0) for p in parameters], device=parameters[0].device)
        dist.all_reduce(used, group=self._group)
        for p, count in zip(parameters, used.tolist(), strict=True):
            if count == 0:
                p.grad = None
