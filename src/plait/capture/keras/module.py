"""A Keras 3 model (torch backend) as an ordinary torch module.

Keras' models are torch modules already, but not as torch's users know them: `.train()` and `.eval()` change nothing (the
mode is an argument of the call), statistics and seeds are parameters without a gradient, random layers make a generator of
their own at every call, and a variable holds its tensor itself, so that torch.export does not see it. Here Keras' own
stateless call is given the tensors, and

    trainable variables                         parameters, under Keras' paths (`dense.kernel`)
    weights of layers that are frozen           parameters without a gradient
    other variables (moving statistics)         buffers, updated in training mode
    seeds of random layers                      left out: random numbers come from torch's generator
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from plait.capture.naming import register
from plait.errors import TargetError

__all__ = ["KerasModule", "Shared", "in_double", "is_keras_model", "keras_with_torch", "quiet_keras"]


class Shared:
    """Something that copies of a module share, because it holds no state that matters."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> Shared:
        return self


def is_keras_model(value: object) -> bool:
    """Whether it is a Keras model; imports nothing."""
    keras = sys.modules.get("keras")
    return keras is not None and hasattr(keras, "Model") and isinstance(value, keras.Model)


def keras_with_torch() -> Any:
    """The keras module, running on torch.

    Raises:
        TargetError: it is not installed, of another major version, or runs on another backend.
    """
    try:
        import keras
    except ModuleNotFoundError:
        raise TargetError("keras is not installed", hint="pip install 'plait[keras]'") from None
    if not keras.__version__.startswith("3."):
        raise TargetError(f"keras {keras.__version__} is here; plait takes models of Keras 3")
    if keras.backend.backend() != "torch":
        raise TargetError(
            f"keras runs on {keras.backend.backend()} here",
            hint='set the environment variable KERAS_BACKEND=torch before keras is imported (os.environ["KERAS_BACKEND"] = "torch")',
        )
    return keras


class KerasModule(nn.Module):
    """The model; called like the Keras model, in the mode that `.train()` and `.eval()` set.

    Gives the model's outputs; with regularisers or `add_loss`, a dict of `outputs` and their sum, `losses`.
    """

    def __init__(self, model: Any, *, has_losses: bool = False) -> None:
        super().__init__()
        keras_with_torch()
        self._model = Shared(model)
        self.has_losses = has_losses
        self.names: dict[str, str] = {}
        """Keras' path of a variable -> its name here."""
        could_train = {id(v) for layer in _layers(model) for v in layer._trainable_variables}
        trains = {id(v) for v in model.trainable_variables}
        self._order: list[list[tuple[str, Any]]] = [[], []]
        for which, variables in enumerate((model.trainable_variables, model.non_trainable_variables)):
            for variable in variables:
                self._order[which].append((self._take(variable, could_train, trains), Shared(variable)))

    def _take(self, variable: Any, could_train: set[int], trains: set[int]) -> str:
        """Name of a variable's tensor here; empty for a seed."""
        value = variable.value.detach()
        if not value.is_floating_point():
            return ""
        kind = "parameter" if id(variable) in trains else "frozen" if id(variable) in could_train else "buffer"
        name = register(self, variable.path, value.clone(), kind=kind, separators="/.")
        self.names[variable.path] = name
        return name

    def _tensor(self, name: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(owner), leaf)  # type: ignore[no-any-return]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's outputs for its inputs: one tensor, several, or by name."""
        model = self._model.value
        given = named or (inputs[0] if len(inputs) == 1 else list(inputs))
        tensors = [[self._tensor(name) if name else held.value.value for name, held in side] for side in self._order]
        mode = {"training": self.training} if model._call_has_training_arg else {}
        variables = [held.value for side in self._order for _, held in side]
        scope = _scope(dict(zip(map(id, variables), [*tensors[0], *tensors[1]], strict=True)))
        first = tensors[0][0] if tensors[0] else torch.zeros(())
        with quiet_keras(first.device), in_double(is_needed=first.dtype == torch.float64), scope:
            outputs = model.call(given, **mode)
            losses = list(model.losses)
        if self.training:
            self._update(tensors[1], [scope.get_current_value(held.value) for _, held in self._order[1]])
        if not self.has_losses:
            return outputs
        return {"outputs": outputs, "losses": torch.stack([loss.reshape(()) for loss in losses]).sum()}

    def _update(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
        for (name, _), old, new in zip(self._order[1], before, after, strict=True):
            if name and new is not old:
                with torch.no_grad():
                    old.copy_(new)

    def to_keras(self) -> Any:
        """The Keras model with this module's values in its variables."""
        for side in self._order:
            for name, held in side:
                if name:
                    held.value.assign(self._tensor(name).detach().cpu())
        return self._model.value


@contextmanager
def in_double(*, is_needed: bool) -> Iterator[None]:
    """Within, Keras computes in float64. By itself it goes back to float32: layers by their policy, operators by the type that
    they give results of 64 bits, losses by the type of the backend.
    """
    if not is_needed:
        yield
        return
    from keras import DTypePolicy, config
    from keras.src.backend.common import dtypes

    before = config.floatx()
    config.set_floatx("float64")
    try:
        with (
            mock.patch.object(DTypePolicy, "compute_dtype", "float64"),
            mock.patch.dict(dtypes.BIT64_TO_BIT32_DTYPE, {"float64": "float64"}),
        ):
            yield
    finally:
        config.set_floatx(before)


def _scope(values: dict[int, torch.Tensor]) -> Any:
    """Keras' stateless scope with these tensors as the values of variables (by id).

    Its own constructor would convert each of them first: views of weights that live from the start of the graph to their
    use, and no place to cut between.
    """
    from keras import StatelessScope

    scope = StatelessScope(collect_losses=True)
    scope.state_mapping = dict(values)
    return scope


def _layers(model: Any) -> list[Any]:
    return list(model._flatten_layers())


@contextmanager
def quiet_keras(device: torch.device) -> Iterator[None]:
    """Within, Keras computes on `device`, draws from torch's generator and normalises batches by torch's operator."""
    from keras import layers
    from keras.src.backend.common import global_state
    from keras.src.backend.torch import random
    from keras.src.losses import loss as losses

    own = layers.BatchNormalization.call

    def batch_norm(layer: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        plain = training and layer.trainable and mask is None and not layer.renorm
        return _batch_norm(layer, inputs) if plain else own(layer, inputs, training=training, mask=mask)

    # As a torch.device: Keras compares it with each tensor's, and a text would never be equal, a copy at every operator.
    before = global_state.get_global_attribute("torch_device", None)
    global_state.set_global_attribute("torch_device", device)
    with (
        mock.patch.object(losses, "reduce_values", _reduced),
        mock.patch.object(random, "torch_seed_generator", return_value=None),
        mock.patch.object(layers.BatchNormalization, "call", batch_norm),
    ):
        try:
            yield
        finally:
            global_state.set_global_attribute("torch_device", before)


def _reduced(values: torch.Tensor, sample_weight: Any = None, reduction: str = "sum_over_batch_size") -> torch.Tensor:
    """Keras' reduction of a loss's values; the count stays a size where Keras makes a tensor of it, which fixes the batch."""
    if reduction in (None, "none") or values.dim() == 0:
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean_with_sample_weight" and sample_weight is not None:
        count: torch.Tensor = sample_weight.sum().to(values.dtype)
        return values.sum() / count
    return values.mean()


def _batch_norm(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Keras' batch norm in training mode through torch's operator, which plait sums over replicas.

    torch keeps the unbiased variance as running statistic, Keras the biased one. The factor between the two is the number
    of values, which only the operator knows when the batch is spread over replicas. So the biased variance is read from
    the operator's result: normalised = (x - mean) / sqrt(variance + epsilon), whose slope over x any two values give.
    """
    keep, eps = float(layer.momentum), float(layer.epsilon)
    x = inputs.movedim(layer.axis, 1) if layer.axis not in (1, 1 - inputs.dim()) else inputs
    mean, variance = layer.moving_mean.value, layer.moving_variance.value
    # Copies: autograd keeps what the operator was given, and that may not change before the backward.
    new_mean, new_variance = mean.detach().clone(), variance.detach().clone()
    normal = F.batch_norm(x, new_mean, new_variance, None, None, training=True, momentum=1.0 - keep, eps=eps)
    with torch.no_grad():
        mean.copy_(new_mean)
        dims = [dim for dim in range(x.dim()) if dim != 1]
        a, b = (t.detach() - t.detach().mean(dims, keepdim=True) for t in (x, normal))
        square = (b * b).sum(dims)
        slope = (a * b).sum(dims) / square
        # Where all values here are equal there is no slope; the unbiased variance is then as good.
        unbiased = (new_variance - keep * variance) / (1.0 - keep)
        biased = torch.where(square > 0, slope * slope - eps, unbiased)
        variance.copy_(keep * variance + (1.0 - keep) * biased)
    shape = [1, -1] + [1] * (x.dim() - 2)
    if layer.gamma is not None:
        normal = normal * layer.gamma.value.view(shape)
    if layer.beta is not None:
        normal = normal + layer.beta.value.view(shape)
    return normal.movedim(1, layer.axis) if x is not inputs else normal


def refuse_special(model: Any) -> None:
    """Refuse what Keras' own training does otherwise than one forward, one loss and one optimizer step.

    Raises:
        TargetError: the model overrides `train_step` or `compute_loss`, or a layer is one that plait cannot follow.
    """
    import keras

    for method in ("train_step", "compute_loss"):
        if getattr(type(model), method) is not getattr(keras.Model, method):
            raise TargetError(
                f"keras model {model.name!r} overrides {method}, which plait does not run",
                hint="give plait.Job a loss and an optimizer of your own, with the module from plait.from_keras(...).model",
            )
    for layer in _layers(model):
        if isinstance(layer, keras.layers.BatchNormalization) and layer.renorm:
            raise TargetError(f"keras layer {layer.name!r}: batch renormalisation is not supported")
