"""A Keras 3 model (torch backend) as an ordinary torch module.

Keras' models are torch modules already, but not as torch's users know them: `.train()` and `.eval()` change nothing (the
mode is an argument of the call), statistics and seeds are parameters without a gradient, random layers make a generator of
their own at every call, and a variable holds its tensor itself, so that torch.export does not see it. Here Keras' own call
runs in a stateless scope that is given the tensors, and

    trainable variables                         parameters, under Keras' paths (`dense.kernel`)
    weights of layers that are frozen           parameters without a gradient
    other variables (moving statistics)         buffers, updated in training mode
    seeds of random layers                      left out: random numbers come from torch's generator
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from plait.capture.keras.context import in_double, quiet_keras, stateless
from plait.capture.naming import register
from plait.errors import TargetError

__all__ = ["KerasModule", "Seen", "Shared", "is_keras_model", "keras_with_torch", "refuse_special"]


class Shared:
    """Something that copies of a module share, because it holds no state that matters."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> Shared:
        return self


@dataclass(frozen=True, slots=True)
class Seen:
    """What one forward in training mode showed."""

    outputs: Any
    has_losses: bool
    """Regularisers or `add_loss`."""
    has_masks: bool
    """Whether an output carries a mask."""


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

    Gives the model's outputs. Where the loss needs more of the forward, a dict of `outputs` and of what it needs: `losses`
    (the sum of regularisers and `add_loss`), `masks` (of each output), `inputs`.
    """

    def __init__(
        self, model: Any, *, has_losses: bool = False, has_masks: bool = False, keeps_inputs: bool = False
    ) -> None:
        super().__init__()
        keras_with_torch()
        self._model = Shared(model)
        self.has_losses = has_losses
        self.has_masks = has_masks
        self.keeps_inputs = keeps_inputs
        self.names: dict[str, str] = {}
        """Keras' path of a variable -> its name here."""
        self._assigned: frozenset[int] = frozenset()
        could_train = {id(v) for layer in _layers(model) for v in layer._trainable_variables}
        trains = {id(v) for v in model.trainable_variables}
        seeds = {id(seed.state) for layer in _layers(model) for seed in layer._seed_generators}
        self._order: list[list[tuple[str, Any]]] = [[], []]
        for which, variables in enumerate((model.trainable_variables, model.non_trainable_variables)):
            for variable in variables:
                name = "" if id(variable) in seeds else self._take(variable, could_train, trains)
                self._order[which].append((name, Shared(variable)))

    def _take(self, variable: Any, could_train: set[int], trains: set[int]) -> str:
        """Name of a variable's tensor here."""
        value = variable.value.detach()
        could = value.is_floating_point() and id(variable) in could_train
        kind = "parameter" if id(variable) in trains else "frozen" if could else "buffer"
        name = register(self, variable.path, value.clone(), kind=kind, separators="/.")
        self.names[variable.path] = name
        return name

    def _tensor(self, name: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(owner), leaf)  # type: ignore[no-any-return]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's outputs for its inputs: one tensor, several, or by name."""
        given = named or (inputs[0] if len(inputs) == 1 else list(inputs))
        tensors = [[self._tensor(name) if name else held.value.value for name, held in side] for side in self._order]
        # What the model assigns to is written at the end; autograd may have kept what was there, so it is given copies.
        states = [
            tensor.clone() if index in self._assigned and self.training else tensor
            for index, tensor in enumerate(tensors[1])
        ]
        scope, outputs, losses = self._call(given, [*tensors[0], *states])
        if self.training:
            now = [scope.get_current_value(held.value) for _, held in self._order[1]]
            with torch.no_grad():
                for (name, _), old, before, after in zip(self._order[1], tensors[1], states, now, strict=True):
                    if name and after is not before:
                        old.copy_(after)
        return self._parts(given, outputs, losses)

    def _call(self, given: Any, values: list[torch.Tensor]) -> tuple[Any, Any, list[Any]]:
        """Keras' call with these values in its variables: (scope, outputs, further losses)."""
        model = self._model.value
        mode = {"training": self.training} if model._call_has_training_arg else {}
        variables = [held.value for side in self._order for _, held in side]
        scope = stateless(dict(zip(map(id, variables), values, strict=True)))
        first = next((value for value in values if value.is_floating_point()), torch.zeros(()))
        with quiet_keras(first.device), in_double(is_needed=first.dtype == torch.float64), scope:
            outputs = model(given, **mode)
            losses = list(model.losses)
        return scope, outputs, losses

    def _parts(self, given: Any, outputs: Any, losses: list[Any]) -> Any:
        parts = {"outputs": outputs}
        if self.has_losses:
            parts["losses"] = torch.stack([loss.sum() for loss in losses]).sum() if losses else torch.zeros(())
        if self.has_masks:
            parts["masks"] = pytree.tree_map(_mask_of, outputs)
        if self.keeps_inputs:
            parts["inputs"] = given
        return outputs if len(parts) == 1 else parts

    def look(self, given: Any) -> Seen:
        """What one forward in training mode shows; leaves the module and torch's generator as they were.

        Raises:
            TargetError: the forward assigns to a trainable variable, which would be lost.
        """
        values = [
            (self._tensor(name) if name else held.value.value).detach().clone()
            for side in self._order
            for name, held in side
        ]
        before = self.training
        self.training = True
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                scope, outputs, losses = self._call(given, values)
        finally:
            self.training = before
        trainable = len(self._order[0])
        changed = [
            index
            for index, (_, held) in enumerate([*self._order[0], *self._order[1]])
            if scope.get_current_value(held.value) is not values[index]
        ]
        for index in changed:
            if index < trainable:
                path = self._order[0][index][1].value.path
                raise TargetError(
                    f"keras model {self._model.value.name!r}: its forward assigns to the trainable weight {path!r}, "
                    "which plait does not follow (SpectralNormalization does so)"
                )
        self._assigned = frozenset(index - trainable for index in changed)
        masks = [_mask_of(leaf) for leaf in pytree.tree_leaves(outputs)]
        return Seen(outputs, bool(losses), any(mask is not None for mask in masks))

    def to_keras(self) -> Any:
        """The Keras model with this module's values in its variables."""
        for side in self._order:
            for name, held in side:
                if name:
                    held.value.assign(self._tensor(name).detach().cpu())
        return self._model.value


def _mask_of(leaf: Any) -> Any:
    from keras.src.backend import get_keras_mask

    return get_keras_mask(leaf)


def _layers(model: Any) -> list[Any]:
    return list(model._flatten_layers())


def refuse_special(model: Any) -> None:
    """Refuse what Keras' own training does otherwise than one forward, one loss and one optimizer step.

    Raises:
        TargetError: the model overrides `train_step`, or a layer is one that plait cannot follow.
    """
    import keras

    if type(model).train_step is not keras.Model.train_step:
        raise TargetError(
            f"keras model {model.name!r} overrides train_step, which plait does not run",
            hint="override compute_loss instead, which plait calls; or give plait.Job a loss and an optimizer of your own, "
            "with the module plait.capture.keras.module.KerasModule(model)",
        )
    for layer in _layers(model):
        if isinstance(layer, keras.layers.BatchNormalization) and layer.renorm:
            raise TargetError(f"keras layer {layer.name!r}: batch renormalisation is not supported")
        if getattr(layer, "stateful", False) is True:
            raise TargetError(
                f"keras layer {layer.name!r}: stateful=True keeps a state of each sample from batch to batch, which no "
                "plan can split",
                hint="use stateful=False",
            )
        if getattr(layer, "quantization_mode", None) is not None:
            raise TargetError(
                f"keras layer {layer.name!r} is quantized ({layer.quantization_mode}): it is for inference"
            )
