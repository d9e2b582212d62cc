"""Batches: whatever pytree the user brings, cut and repeated along its batch dimension."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from plait.capture.job import Job
from plait.errors import TargetError

__all__ = ["batch_size", "dims_of", "map_batch", "resized", "split", "weight_of"]

_BatchMap = Callable[[torch.Tensor, int | None], Any]


def dims_of(job: Job) -> list[int | None]:
    """Batch dimension of every leaf of `(inputs, targets)`, in pytree order; None where there is none."""
    inputs, targets = job.batch
    size = _first_size(job)
    found: list[int | None] = []
    for path, leaf in pytree.tree_flatten_with_path((inputs, targets))[0]:
        dim = _declared_dim(job, path)
        if not isinstance(leaf, torch.Tensor) or dim is None or leaf.dim() <= dim or leaf.shape[dim] != size:
            dim = None
        found.append(dim)
    return found


def _declared_dim(job: Job, path: Any) -> int | None:
    in_targets = path[0].idx == 1
    if isinstance(job.batch_dim, dict):
        key = None if in_targets or len(path) < 2 else getattr(path[1], "key", getattr(path[1], "idx", None))
        return job.batch_dim.get(str(key), 0)
    return 0 if in_targets else job.batch_dim


def _first_size(job: Job) -> int:
    inputs, targets = job.batch
    for path, leaf in pytree.tree_flatten_with_path((inputs, targets))[0]:
        dim = _declared_dim(job, path)
        if isinstance(leaf, torch.Tensor) and dim is not None and leaf.dim() > dim:
            return int(leaf.shape[dim])
    raise TargetError("job: no tensor of the sample batch has a batch dimension", hint="set batch_dim of the Job")


def batch_size(job: Job, batch: tuple[Any, Any] | None = None) -> int:
    """Samples in a batch (the job's own if None)."""
    if batch is None:
        return _first_size(job)
    for leaf, dim in zip(pytree.tree_leaves(batch), dims_of(job), strict=True):
        if dim is not None:
            return int(leaf.shape[dim])
    raise TargetError("batch: no tensor has a batch dimension")


def weight_of(job: Job, part: tuple[Any, Any]) -> float | None:
    """What the Job's `loss_weight` says of a part of a batch; None where it has none."""
    function = job.loss_weight
    if function is None:
        return None
    takes_inputs = len(inspect.signature(function).parameters) > 1
    return float(function(*part) if takes_inputs else function(part[1]))


def map_batch(job: Job, batch: tuple[Any, Any], function: _BatchMap) -> tuple[Any, Any]:
    """`function(leaf, batch_dim)` on every tensor leaf; leaves that are no tensors stay."""
    leaves, spec = pytree.tree_flatten(batch)
    dims = dims_of(job)
    if len(leaves) != len(dims):
        raise TargetError(
            f"batch: it has {len(leaves)} leaves, the job's sample batch has {len(dims)}",
            hint="batches from `data` must have the structure of the Job's `batch`",
        )
    mapped = [
        function(leaf, dim) if isinstance(leaf, torch.Tensor) else leaf for leaf, dim in zip(leaves, dims, strict=True)
    ]
    inputs, targets = pytree.tree_unflatten(mapped, spec)
    return inputs, targets


def resized(job: Job, samples: int) -> tuple[Any, Any]:
    """The job's sample batch cut or repeated to `samples`."""
    have = batch_size(job)
    index = torch.arange(samples) % have

    def pick(leaf: torch.Tensor, dim: int | None) -> torch.Tensor:
        return leaf if dim is None or samples == have else leaf.index_select(dim, index.to(leaf.device))

    return map_batch(job, job.batch, pick)


def split(job: Job, batch: tuple[Any, Any], bounds: tuple[int, int]) -> tuple[Any, Any]:
    """Samples `bounds[0]:bounds[1]` of a batch."""
    start, stop = bounds

    def cut(leaf: torch.Tensor, dim: int | None) -> torch.Tensor:
        return leaf if dim is None else leaf.narrow(dim, start, stop - start)

    return map_batch(job, batch, cut)
