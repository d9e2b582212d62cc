"""Keras' loss of a compiled model as loss(outputs, targets), and what it is a mean over.

reduction                                       a part of a batch weighs
sum_over_batch_size, mean                       its samples
the same under a mask (mask_zero, Masking,      the values that the mask leaves (KerasWeight)
    ignore_class)
mean_with_sample_weight                         the sum of its sample weights (KerasWeight)
sum, none                                       nothing: refused
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from plait.capture.keras.context import MEANS_OVER_ALL, in_double, quiet_keras, stateless
from plait.capture.keras.module import KerasModule, Shared
from plait.capture.trace import call_model, eval_mode
from plait.errors import TargetError

__all__ = ["Counted", "KerasLoss", "KerasWeight", "overrides_compute_loss"]


@dataclass(frozen=True, slots=True)
class Counted:
    """What one loss is a mean over."""

    reduction: str
    mask: torch.Tensor | None
    """Which of its values count; None: all."""
    weights: torch.Tensor | None
    """Sample weights, where the mean is over their sum."""

    @property
    def amount(self) -> torch.Tensor | None:
        """How much; None where it is the number of values."""
        if self.weights is not None:
            return (self.weights if self.mask is None else self.weights * self.mask).sum()
        return None if self.mask is None else self.mask.sum()


def overrides_compute_loss(model: Any) -> bool:
    """Whether the model's class has a loss of its own."""
    import keras

    return type(model).compute_loss is not keras.Model.compute_loss


class KerasLoss:
    """loss(outputs, targets) as `compile` and `compute_loss` set it: weights, reduction, masks, regularisers, `add_loss`.

    `outputs` are those of a `KerasModule`; with `is_weighted`, `targets` is a dict of `targets` and `sample_weight`.
    `class_weight` weighs samples by their class, as in `fit`.
    """

    def __init__(self, model: Any, *, is_weighted: bool = False, class_weight: dict[int, float] | None = None) -> None:
        self._model = Shared(model)
        self._is_weighted = is_weighted
        self._class_weight = class_weight

    def __call__(self, outputs: Any, targets: Any) -> torch.Tensor:
        """A scalar."""
        model = self._model.value
        weights = None
        if self._is_weighted:
            targets, weights = targets["targets"], targets["sample_weight"]
        elif self._class_weight:
            weights = _class_weights(targets, self._class_weight)
        parts = outputs if _is_parts(outputs) else {"outputs": outputs}
        made = parts["outputs"]
        if "masks" in parts:
            _set_masks(made, parts["masks"])
        extra = parts.get("losses")
        first = pytree.tree_leaves(made)[0]
        in_full = in_double(is_needed=first.dtype == torch.float64)
        with quiet_keras(first.device), in_full, _unmeasured(model), ExitStack() as open_:
            if overrides_compute_loss(model):
                open_.enter_context(_apart(model, extra))
                value: torch.Tensor = model._compute_loss(
                    x=parts.get("inputs"), y=targets, y_pred=made, sample_weight=weights, training=True
                )
                return value
            open_.enter_context(stateless({}))
            if model._compile_loss is None:
                assert extra is not None  # from_keras refuses a model without either
                return extra  # type: ignore[no-any-return]
            value = model._compile_loss(targets, made, weights)
        return value if extra is None else value + extra

    def counted(self, outputs: Any, targets: Any) -> list[Counted]:
        """What each of Keras' losses is a mean over, in the order in which they are computed."""
        from keras.src.losses import loss as losses

        found: list[Counted] = []
        own = losses.reduce_weighted_values

        def reduce(values: Any, sample_weight: Any = None, mask: Any = None, reduction: Any = None, **more: Any) -> Any:
            weighs = reduction == "mean_with_sample_weight" and sample_weight is not None
            found.append(Counted(str(reduction), mask, sample_weight if weighs else None))
            return own(values, sample_weight=sample_weight, mask=mask, reduction=reduction, **more)

        with mock.patch.object(losses, "reduce_weighted_values", reduce):
            self(outputs, targets)
        return found


def _is_parts(outputs: Any) -> bool:
    known = {"outputs", "losses", "masks", "inputs"}
    return isinstance(outputs, dict) and "outputs" in outputs and len(outputs) > 1 and set(outputs) <= known


def _set_masks(outputs: Any, masks: Any) -> None:
    from keras.src.backend import set_keras_mask

    leaves, spec = pytree.tree_flatten(outputs)
    for leaf, mask in zip(leaves, spec.flatten_up_to(masks), strict=True):
        if mask is not None:
            set_keras_mask(leaf, mask)


@contextmanager
def _unmeasured(model: Any) -> Iterator[None]:
    """Without running means of losses and metrics, whose weights would fix the batch."""
    metrics = {id(m): m for m in (*model.metrics, *(model._compile_loss.metrics if model._compile_loss else ()))}
    with ExitStack() as stack:
        for metric in metrics.values():
            stack.enter_context(mock.patch.object(metric, "update_state", return_value=None))
        yield


@contextmanager
def _apart(model: Any, extra: Any) -> Iterator[None]:
    """For the model's own `compute_loss`: its further losses are those of the forward, its variables are not to be read."""
    variables = {id(v): v.path for v in model.variables}
    scope = stateless({})

    def current(variable: Any) -> Any:
        if id(variable) in variables:
            raise TargetError(
                f"keras model {model.name!r}: its compute_loss reads the weight {variables[id(variable)]!r}",
                hint="plait runs the loss apart from the model's weights: compute in call(), give it out or add_loss() it",
            )
        return scope.state_mapping.get(id(variable))

    scope.get_current_value = current
    losses = [] if extra is None else [extra]
    with mock.patch.object(type(model), "losses", property(lambda _: losses)), scope:
        yield


def _class_weights(targets: torch.Tensor, table: dict[int, float]) -> torch.Tensor:
    """Weight of each sample by its class, as `fit(class_weight=...)` has it; 1 for a class that is not named."""
    if targets.dim() > 1:
        targets = targets.squeeze(-1) if targets.shape[-1] == 1 else targets.argmax(-1)
    classes = torch.round(targets) if targets.is_floating_point() else targets
    weights = torch.ones(classes.shape, device=classes.device)
    for name, weight in table.items():
        weights = torch.where(classes == int(name), float(weight), weights)
    return weights


class KerasWeight:
    """weight(inputs, targets) of a part of a batch: what its loss is a mean over, counted without the weights' work.

    Masks follow from the inputs; the part of the model that makes them is captured by itself. Where that cannot be captured
    for any number of samples, the whole forward runs for it.
    """

    def __init__(self, module: KerasModule, loss: KerasLoss, batch: tuple[Any, Any]) -> None:
        whole = _Counter(module, loss)
        with eval_mode(whole):
            self._count = Shared(_captured(whole, batch) or whole)

    def __call__(self, inputs: Any, targets: Any) -> torch.Tensor:
        """A scalar."""
        count = self._count.value
        with torch.no_grad(), eval_mode(count) if isinstance(count, nn.Module) else nullcontext():
            found: torch.Tensor = count(inputs, targets)
            return found


class _Counter(nn.Module):
    def __init__(self, module: KerasModule, loss: KerasLoss) -> None:
        super().__init__()
        self.module = module
        self._loss = loss

    def forward(self, inputs: Any, targets: Any) -> torch.Tensor:
        amount = self._loss.counted(call_model(self.module, inputs), targets)[0].amount
        assert amount is not None  # asked for only where something is counted
        return amount


def _captured(whole: _Counter, batch: tuple[Any, Any]) -> Callable[[Any, Any], torch.Tensor] | None:
    """The part of the graph that the count needs, if it needs no weight and takes any number of samples."""
    shapes = pytree.tree_map(
        lambda leaf: {0: torch.export.Dim.AUTO} if isinstance(leaf, torch.Tensor) and leaf.dim() else None, batch
    )
    try:
        exported = torch.export.export(whole, batch, dynamic_shapes=shapes, strict=False)
    except Exception:  # whatever stops the capture, the whole forward gives the same number
        return None
    graph = exported.graph_module.graph
    for node in list(graph.nodes):
        if str(node.target).startswith(("aten._assert", "aten.sym_constrain", "aten._assert_scalar")):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    constants: list[torch.Tensor | None] = []
    for node in graph.find_nodes(op="placeholder"):
        spec = kinds[node.name]
        if spec.kind.name == "USER_INPUT":
            constants.append(None)
        elif not node.users:
            graph.erase_node(node)
        elif spec.kind.name == "CONSTANT_TENSOR":
            constants.append(exported.constants[spec.target or ""])
        else:
            return None
    made = fx.GraphModule(exported.graph_module, graph)

    def count(inputs: Any, targets: Any) -> torch.Tensor:
        given = iter(pytree.tree_leaves((inputs, targets)))
        values = [next(given) if constant is None else constant for constant in constants]
        return made(*values)[0]  # type: ignore[no-any-return]

    return count


def is_plain_mean(counted: list[Counted]) -> bool:
    """Whether all losses are means over samples."""
    return all(one.reduction in (*MEANS_OVER_ALL, "mean_with_sample_weight") and one.amount is None for one in counted)


def check_counted(name: str, counted: list[Counted], losses: list[str]) -> None:
    """Refuse losses that are no weighted mean of those of a batch's parts.

    Raises:
        TargetError: a reduction that sums, or losses that are means over different things.
    """
    labels = [label or "loss" for label in losses] or ["loss"]
    for index, one in enumerate(counted):
        if one.reduction not in (*MEANS_OVER_ALL, "mean_with_sample_weight"):
            raise TargetError(
                f"keras loss {labels[min(index, len(labels) - 1)]}: reduction {one.reduction!r} is no mean over samples",
                hint="use reduction='sum_over_batch_size' and scale the learning rate",
            )
    first = counted[0] if counted else None
    for one in counted[1:]:
        assert first is not None
        if not (_same(first.mask, one.mask) and _same(first.weights, one.weights)):
            raise TargetError(
                f"keras model {name!r}: its losses ({', '.join(labels)}) are means over different values (masks or weights "
                "that differ), so that no weight of a part of a batch is right for all",
                hint="give the outputs the same mask, or one of them a loss without one",
            )


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool((a == b).all())
