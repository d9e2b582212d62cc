"""What Keras does otherwise while plait runs it: on which device, in which precision, with whose random numbers.

Each is put back when the block ends. Batches are normalised by torch's operator (which plait sums over replicas), and sizes
stay sizes: Keras makes tensors of them, which fixes the batch when torch.export follows the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

__all__ = ["MEANS_OVER_ALL", "in_double", "quiet_keras", "stateless"]

MEANS_OVER_ALL = ("sum_over_batch_size", "mean")
"""Reductions of a loss that divide by the number of values, or of those that a mask leaves."""


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


def stateless(values: dict[int, torch.Tensor]) -> Any:
    """Keras' stateless scope with these tensors as the values of variables (by id).

    Its own constructor would convert each of them first: views of weights that live from the start of the graph to their
    use, and no place to cut between.
    """
    from keras import StatelessScope

    scope = StatelessScope(collect_losses=True)
    scope.state_mapping = dict(values)
    return scope


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
        mock.patch.object(losses, "apply_mask", _masked),
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
        return torch.where(count == 0, 0.0, values.sum() / torch.where(count == 0, 1.0, count))
    return values.mean()


def _masked(sample_weight: Any, mask: Any, dtype: Any, reduction: str) -> Any:
    """Keras' weights of samples under a mask, whose count of all values stays a size.

    Left values weigh (all values / left values), so that the mean over all becomes the mean over what is left.
    """
    from keras.src.backend.torch.core import to_torch_dtype
    from keras.src.losses.loss import squeeze_or_expand_to_same_rank

    if mask is None:
        return sample_weight
    kind = to_torch_dtype(dtype)
    weights: torch.Tensor = mask.to(kind)
    if reduction in MEANS_OVER_ALL:
        left = weights.sum()
        share = torch.where(left == 0, 0.0, weights.numel() / torch.where(left == 0, 1.0, left))
        weights = torch.where(mask.to(torch.bool), share, 0.0).to(kind)
    if sample_weight is None:
        return weights
    weights, given = squeeze_or_expand_to_same_rank(weights, sample_weight.to(kind))
    return given * weights


def _batch_norm(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Keras' batch norm in training mode through torch's operator, which plait sums over replicas.

    torch keeps the unbiased variance as running statistic, Keras the biased one. The factor between the two is the number
    of values, which only the operator knows when the batch is spread over replicas. So the biased variance is read from
    the operator's result: normalised = (x - mean) / sqrt(variance + epsilon), whose slope over x any two values give.
    """
    keep, eps = float(layer.momentum), float(layer.epsilon)
    inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))  # half precision is normalised in single
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
    if x is not inputs:
        normal = normal.movedim(1, layer.axis)
    compute = getattr(torch, layer.compute_dtype)
    return normal if normal.dtype == compute else normal.to(compute)
