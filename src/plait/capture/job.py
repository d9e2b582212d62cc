"""What a user brings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import Dataset

__all__ = ["Job"]


@dataclass
class Job:
    """A model, a loss, an optimizer factory, a sample batch, and data. No base class to inherit."""

    model: nn.Module | Callable[[], nn.Module]
    """A module, or a function that builds one (then built shard by shard, never whole)."""
    _: KW_ONLY
    batch: tuple[Any, Any]
    """A sample `(inputs, targets)`; inputs a tensor, a tuple (positional) or a dict (keyword arguments)."""
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    """loss(outputs, targets) -> scalar, a mean over samples; None: the model's own `.loss`, or its scalar output."""
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    """factory([(name, parameter), ...]) -> optimizer; None: AdamW at 1e-3."""
    data: Iterable[Any] | Dataset[Any] | Callable[[], Any] | None = None
    """Batches, a map-style Dataset of samples, or a function of nothing that gives one; None: the sample batch."""
    loss_weight: Callable[..., torch.Tensor | float] | None = None
    """weight(targets) of a part of the batch, where the mean is over something else than samples (tokens that count);
    a function of two arguments is given (inputs, targets)."""
    batch_dim: int | dict[str, int | None] | None = 0
    """Batch dimension of every input, or by input name; None for an input that has none."""
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    """factory(optimizer) -> learning-rate scheduler, stepped once a step."""
    clip_norm: float | None = None
    """Clip gradients to this global norm."""
    evaluate: Iterable[Any] | Dataset[Any] | Callable[[], Any] | None = None
    """Batches (or a Dataset, or a function giving one) whose mean loss is reported every `--eval-every` steps."""
    name: str = ""
    """For reports; the model's class if empty."""
    generate: Callable[..., str] | None = None
    """generate(model) -> text shown after training, with the trained whole model; None: nothing is shown."""

    def __post_init__(self) -> None:
        # A Keras model is a torch module, but one that `.train()` and torch.export do not know what to do with.
        if "keras" in sys.modules:
            from plait.capture.keras.module import is_keras_model

            if is_keras_model(self.model):
                from plait.capture.keras.job import adopt

                adopt(self)
