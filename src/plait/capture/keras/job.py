"""A compiled Keras model as a Job: its loss, its optimizer, its clipping and its learning-rate schedule."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from plait.capture.job import Job
from plait.capture.keras.module import (
    KerasModule,
    Shared,
    in_double,
    is_keras_model,
    keras_with_torch,
    quiet_keras,
    refuse_special,
)
from plait.capture.keras.optimizers import optimizer_factory, schedule_factory
from plait.errors import TargetError

__all__ = ["KerasLoss", "adopt", "from_keras"]

_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


class KerasLoss:
    """loss(outputs, targets) as `compile` set it, with its weights and reduction, plus regularisers and `add_loss`."""

    def __init__(self, model: Any) -> None:
        self._model = Shared(model)

    def __call__(self, outputs: Any, targets: Any) -> torch.Tensor:
        """A scalar."""
        import keras

        extra = None
        if isinstance(outputs, dict) and set(outputs) == {"outputs", "losses"}:
            outputs, extra = outputs["outputs"], outputs["losses"]
        first = pytree.tree_leaves(outputs)[0]
        loss = self._model.value._compile_loss
        in_full = in_double(is_needed=first.dtype == torch.float64)
        with quiet_keras(first.device), in_full, keras.StatelessScope(), ExitStack() as unmeasured:
            for metric in loss.metrics:  # running means of each output's loss, whose weights would fix the batch
                unmeasured.enter_context(mock.patch.object(metric, "update_state", return_value=None))
            value: torch.Tensor = loss(targets, outputs)
        return value if extra is None else value + extra


def from_keras(model: Any, *, batch: tuple[Any, Any], **options: Any) -> Job:
    """A Job of a Keras 3 model that runs on torch, trained as `model.fit` would train it.

    `batch` is a sample (inputs, targets) of numpy arrays or tensors; inputs as the model takes them, several as a tuple or
    a dict. Loss, optimizer, gradient clipping and learning-rate schedule are those of `model.compile(...)`; whatever else a
    Job takes (`data=`, or `loss=` and `optimizer=` of torch's for a model that is not compiled) may be given as well. The Job's
    `model` is a `KerasModule`; after training, `to_keras()` puts its values back into the Keras model.

    Raises:
        TargetError: Keras runs on another backend, the model is no Keras model, or something of it is not reproduced.
    """
    keras_with_torch()
    if not is_keras_model(model):
        raise TargetError(f"from_keras takes a Keras model, not a {type(model).__name__}")
    inputs, targets = (_as_tensors(part) for part in batch)
    refuse_special(model)
    found, losses = _trial(model, inputs)
    module = KerasModule(model, has_losses=bool(losses))
    module.train()
    given: dict[str, Any] = {"name": model.name}
    if model.compiled and model.optimizer is not None and "optimizer" not in options:
        keras_names = {module.names[v.path]: v.name for v in model.trainable_variables}
        given["optimizer"] = optimizer_factory(model.optimizer, keras_names)
        given["scheduler"] = schedule_factory(model.optimizer)
        given["clip_norm"] = getattr(model.optimizer, "global_clipnorm", None)
    if "loss" not in options:
        if not model.compiled or model._compile_loss is None:
            raise TargetError(
                f"keras model {model.name!r} is not compiled with a loss",
                hint="call model.compile(optimizer=..., loss=...), or give loss= and optimizer=",
            )
        given["loss"] = _loss(model, found, targets)
    return Job(module, batch=(inputs, targets), **{**given, **options})


def adopt(job: Job) -> None:
    """Make a Job that was given a Keras model what `from_keras` makes of it; what was given stays.

    Raises:
        TargetError: as `from_keras`.
    """
    given = {name: getattr(job, name) for name in ("loss", "optimizer", "scheduler", "clip_norm", "name")}
    made = from_keras(job.model, batch=job.batch, **{name: value for name, value in given.items() if value})
    for name in ("model", "batch", *given):
        setattr(job, name, getattr(made, name))


def _as_tensors(part: Any) -> Any:
    """numpy arrays as tensors; double precision becomes single, as in Keras."""

    def convert(leaf: Any) -> Any:
        tensor = torch.as_tensor(leaf)
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    return tuple(map(_as_tensors, part)) if isinstance(part, list) else pytree.tree_map(convert, part)


def _trial(model: Any, inputs: Any) -> tuple[Any, list[Any]]:
    """The model's outputs and further losses; builds the variables of a model that has none yet."""
    given = list(inputs) if isinstance(inputs, tuple) and len(inputs) > 1 else inputs
    given = given[0] if isinstance(given, tuple) else given
    try:
        with torch.no_grad():
            outputs = model(given)
        losses = list(model.losses)
    except Exception as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:300]
        raise TargetError(f"keras model {model.name!r} does not take this batch: {reason}") from None
    return outputs, losses


def _loss(model: Any, outputs: Any, targets: Any) -> KerasLoss:
    loss = model._compile_loss
    masked = [leaf for leaf in pytree.tree_leaves(outputs) if getattr(leaf, "_keras_mask", None) is not None]
    if masked:
        raise TargetError(
            f"keras model {model.name!r}: its loss is weighted by a mask (mask_zero or a Masking layer)",
            hint="give loss= and loss_weight= to from_keras: the mean is over something else than samples",
        )
    try:
        loss(targets, outputs)  # builds it
    except Exception as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:300]
        raise TargetError(f"keras model {model.name!r}: its loss does not take these targets: {reason}") from None
    for _, function, _, name in loss._flat_losses:
        reduction = getattr(function, "reduction", "sum_over_batch_size")
        if reduction not in _MEANS:
            raise TargetError(
                f"keras loss {name or type(function).__name__}: reduction {reduction!r} is no mean over samples",
                hint="use reduction='sum_over_batch_size' and scale the learning rate",
            )
    return KerasLoss(model)
