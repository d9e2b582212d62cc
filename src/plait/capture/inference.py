"""The job as it is served: no targets, no loss, and inputs without what only the loss reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from plait.capture import batch as batches
from plait.capture.arguments import nearest
from plait.capture.job import Job
from plait.errors import TargetError

__all__ = ["inference_job", "served_inputs"]

_LABELS = ("labels", "label_ids")
"""Keyword arguments that transformers' models take for their own loss."""


def inference_job(job: Job, module: nn.Module) -> Job:
    """The job with its forward's inputs only: `batch=(inputs, ())`, no loss, no optimizer.

    Labels among keyword inputs are left out. A model that makes its decoder's inputs from them (an encoder-decoder of
    transformers, by `prepare_decoder_input_ids_from_labels`) gets these instead.
    """
    inputs = job.batch[0]
    if isinstance(inputs, Mapping) and any(name in inputs for name in _LABELS):
        rest = {name: value for name, value in inputs.items() if name not in _LABELS}
        labels = next(inputs[name] for name in _LABELS if name in inputs)
        shifted = getattr(module, "prepare_decoder_input_ids_from_labels", None)
        if shifted is not None and "decoder_input_ids" not in rest:
            rest["decoder_input_ids"] = shifted(labels=labels)
        inputs = rest
    return replace(job, batch=(inputs, ()), loss=None, optimizer=None, loss_weight=None, scheduler=None)


def served_inputs(job: Job, inputs: Any) -> tuple[Any, tuple[()]]:
    """A batch of an `inference_job` from what a caller brings, checked against the sample.

    Raises:
        TargetError: an input is missing, unknown, no tensor, or of another shape or dtype than the sample's beside its
            batch dimension.
    """
    sample = job.batch[0]
    if isinstance(sample, Mapping):
        inputs = _named(sample, inputs)
    elif isinstance(sample, tuple | list) and not isinstance(inputs, tuple | list):
        raise TargetError(f"inputs: {len(sample)} positional ones are wanted, got a {type(inputs).__name__}")
    found = _leaves(inputs)
    wanted = _leaves(sample)
    if found.keys() != wanted.keys():
        raise TargetError(
            f"inputs: they have {', '.join(found) or 'no tensor'}; the sample has {', '.join(wanted)}",
            hint="inputs must have the structure of the Job's sample batch",
        )
    samples: dict[str, int] = {}
    for (name, tensor), (_, like), dim in zip(found.items(), wanted.items(), batches.dims_of(job), strict=True):
        if isinstance(like, torch.Tensor):
            _check(name, tensor, like, dim)
            if dim is not None:
                samples[name] = int(tensor.shape[dim])
    if len(set(samples.values())) > 1:
        told = ", ".join(f"{name} has {count}" for name, count in samples.items())
        raise TargetError(f"inputs: not the same number of samples everywhere: {told}")
    if min(samples.values(), default=1) < 1:
        raise TargetError("inputs: an empty batch")
    return inputs, ()


def _named(sample: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
    if not isinstance(inputs, Mapping):
        raise TargetError(f"inputs: a dict with {', '.join(sample)} is wanted, got a {type(inputs).__name__}")
    for name in inputs:
        if name not in sample and name not in _LABELS:
            raise TargetError(f"inputs: the model was captured without {name!r}{nearest(name, sample)}")
    missing = [name for name in sample if name not in inputs]
    if missing:
        raise TargetError(f"inputs: {', '.join(missing)} is missing")
    return {name: inputs[name] for name in sample}


def _leaves(inputs: Any) -> dict[str, Any]:
    from torch.utils import _pytree as pytree

    return {f"inputs{pytree.keystr(path)}": leaf for path, leaf in pytree.tree_flatten_with_path(inputs)[0]}


def _check(name: str, tensor: Any, like: torch.Tensor, dim: int | None) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TargetError(f"{name}: a tensor is wanted, got a {type(tensor).__name__}")
    same = tensor.dim() == like.dim() and all(
        a == b for i, (a, b) in enumerate(zip(tensor.shape, like.shape, strict=True)) if i != dim
    )
    if not same:
        shown = ["*" if i == dim else str(n) for i, n in enumerate(like.shape)]
        raise TargetError(
            f"{name}: shape {list(tensor.shape)}, but the model was captured for [{', '.join(shown)}]",
            hint="only the batch may differ from the sample; make the job's sample batch of the shape that is served",
        )
    if tensor.dtype != like.dtype:
        raise TargetError(f"{name}: {tensor.dtype}, but the model was captured for {like.dtype}")
