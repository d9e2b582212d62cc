"""A compiled Keras model as a Job: its loss, its optimizer, its clipping and its learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from plait.capture.job import Job
from plait.capture.keras.loss import KerasLoss, KerasWeight, check_counted, is_plain_mean, overrides_compute_loss
from plait.capture.keras.module import KerasModule, is_keras_model, keras_with_torch, refuse_special
from plait.capture.keras.optimizers import optimizer_factory, schedule_factory, unscaled
from plait.capture.trace import call_model, eval_mode
from plait.errors import TargetError

__all__ = ["adopt", "from_keras"]


def from_keras(
    model: Any, *, batch: tuple[Any, ...], class_weight: dict[int, float] | None = None, **options: Any
) -> Job:
    """A Job of a Keras 3 model that runs on torch, trained as `model.fit` would train it.

    `batch` is a sample (inputs, targets) or (inputs, targets, sample_weight) of numpy arrays or tensors; inputs as the model
    takes them, several as a tuple or a dict. With sample weights, the targets of the Job's batches are a dict of `targets` and
    `sample_weight`. `class_weight` weighs samples by their class, as in `fit`. Loss, masks, optimizer, gradient clipping and
    learning-rate schedule are those of `model.compile(...)`; whatever else a Job takes (`data=`, or `loss=` and `optimizer=`
    of torch's for a model that is not compiled) may be given as well. The Job's `model` is a `KerasModule`; after training,
    `to_keras()` puts its values back into the Keras model.

    Raises:
        TargetError: Keras runs on another backend, the model is no Keras model, or something of it is not reproduced.
    """
    keras_with_torch()
    if not is_keras_model(model):
        raise TargetError(f"from_keras takes a Keras model, not a {type(model).__name__}")
    inputs, targets = _pair(model, batch)
    refuse_special(model)
    _build(model, inputs)
    module = KerasModule(model)
    try:
        seen = module.look(_as_keras(inputs))
    except TargetError:
        raise
    except Exception as problem:
        raise _does_not_take(model, "this batch", problem) from None
    module.train()
    given: dict[str, Any] = {"name": model.name}
    if model.compiled and model.optimizer is not None and "optimizer" not in options:
        variables = {module.names[v.path]: v for v in model.trainable_variables}
        optimizer = unscaled(model.optimizer, model._flatten_layers())
        given["optimizer"] = optimizer_factory(optimizer, variables)
        given["scheduler"] = schedule_factory(optimizer)
        given["clip_norm"] = optimizer.global_clipnorm
    module.has_losses = seen.has_losses
    if "loss" not in options:
        module.has_masks, module.keeps_inputs = seen.has_masks, overrides_compute_loss(model)
        given |= _loss(model, module, (inputs, targets), is_weighted=len(batch) == 3, class_weight=class_weight)
    return Job(module, batch=(inputs, targets), **{**given, **options})


def adopt(job: Job) -> None:
    """Make a Job that was given a Keras model what `from_keras` makes of it; what was given stays.

    Raises:
        TargetError: as `from_keras`.
    """
    names = ("loss", "loss_weight", "optimizer", "scheduler", "clip_norm", "name")
    given = {name: getattr(job, name) for name in names}
    made = from_keras(job.model, batch=job.batch, **{name: value for name, value in given.items() if value})
    for name in ("model", "batch", *given):
        setattr(job, name, getattr(made, name))


def _pair(model: Any, batch: tuple[Any, ...]) -> tuple[Any, Any]:
    """(inputs, targets) as tensors; weights of samples beside the targets."""
    if not 1 <= len(batch) <= 3:
        raise TargetError(
            f"keras model {model.name!r}: batch is no (inputs, targets)",
            hint="give (x, y), or (x, y, sample_weight), of numpy arrays or tensors",
        )
    inputs, targets, weights = (*map(_as_tensors, batch), None, None)[:3]
    return inputs, targets if len(batch) < 3 else {"targets": targets, "sample_weight": weights}


def _as_tensors(part: Any) -> Any:
    """numpy arrays as tensors; double precision becomes single, as in Keras."""

    def convert(leaf: Any) -> Any:
        if leaf is None:
            return None
        tensor = torch.as_tensor(leaf)
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    return tuple(map(_as_tensors, part)) if isinstance(part, list) else pytree.tree_map(convert, part)


def _as_keras(inputs: Any) -> Any:
    """As a Keras model is called: several as a list."""
    if isinstance(inputs, tuple):
        return list(inputs) if len(inputs) > 1 else inputs[0]
    return inputs


def _build(model: Any, inputs: Any) -> None:
    """Let a model that has no variables yet make them."""
    if model.built:
        return
    try:
        with torch.no_grad():
            model(_as_keras(inputs))
    except Exception as problem:
        raise _does_not_take(model, "this batch", problem) from None


def _does_not_take(model: Any, what: str, problem: Exception) -> TargetError:
    reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:300]
    return TargetError(f"keras model {model.name!r} does not take {what}: {reason}")


def _loss(
    model: Any,
    module: KerasModule,
    batch: tuple[Any, Any],
    *,
    is_weighted: bool,
    class_weight: dict[int, float] | None,
) -> dict[str, Any]:
    """`loss`, and `loss_weight` where the mean is over something else than samples."""
    is_own = overrides_compute_loss(model)
    if not is_own and (not model.compiled or (model._compile_loss is None and not module.has_losses)):
        raise TargetError(
            f"keras model {model.name!r} is not compiled with a loss",
            hint="call model.compile(optimizer=..., loss=...), or give loss= and optimizer=",
        )
    loss = KerasLoss(model, is_weighted=is_weighted, class_weight=class_weight)
    inputs, targets = batch
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), eval_mode(module):
            counted = loss.counted(call_model(module, inputs), targets)
    except TargetError:
        raise
    except Exception as problem:
        what = "what its compute_loss is given" if is_own else "these targets in its loss"
        raise _does_not_take(model, what, problem) from None
    flat = [] if model._compile_loss is None else list(model._compile_loss._flat_losses or ())
    check_counted(model.name, counted, [name or type(function).__name__ for _, function, _, name in flat])
    if is_plain_mean(counted):
        return {"loss": loss}
    return {"loss": loss, "loss_weight": KerasWeight(module, loss, batch)}
