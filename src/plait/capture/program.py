"""The captured model, executable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import fx

    from plait.capture.job import Job
    from plait.schema import Graph

__all__ = ["Placeholder", "Program"]


@dataclass(frozen=True, slots=True)
class Placeholder:
    """One argument of the captured graph."""

    kind: Literal["parameter", "buffer", "constant", "input"]
    name: str
    """The user's own name of a parameter or buffer (the first one when tied); the input's path, such as
    `inputs.input_ids`, `inputs.0` or `targets`."""
    trainable: bool = False
    reached: bool = True
    """Whether the loss depends on it; a trainable parameter that it does not depend on never gets a gradient."""


@dataclass
class Program:
    """A model's forward (with its loss where that could be captured), flat: parameters are arguments.

    `module.graph` is torch.export's training-level graph: ATen operators before any decomposition, differentiable in
    eager. Its placeholders are described by `placeholders`; its single output node returns a tuple of tensors.
    `node.meta["val"]` holds a fake tensor (batch dimension symbolic where `dynamic`), `node.meta["segment"]` the
    index of the node's segment.
    """

    job: Job
    module: fx.GraphModule
    placeholders: dict[str, Placeholder]
    """By placeholder node name, in the graph's order."""
    has_loss: bool
    """Whether the output is the loss; otherwise the outputs' leaves, and the loss is computed from them in eager."""
    sizes: tuple[int, int]
    """The least and the most samples that may be fed."""
    batch: int
    """Samples at capture."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Tied names: every other name of a parameter to its first."""
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    """Values of the "constant" placeholders, by name."""
    graph: Graph | None = None
    outputs_spec: Any = None
    """pytree spec of the model's outputs, where the loss is not captured."""
    fixed_outputs: dict[int, Any] = field(default_factory=dict)
    """Leaves of the outputs that are no tensors, by position."""
    train: bool = True
    """Whether this is the forward of training; False: of eval mode, without a loss."""

    def outputs_of(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The model's outputs in their own structure, from the graph's tensors."""
        from torch.utils import _pytree as pytree

        rest = iter(tensors)
        count = len(tensors) + len(self.fixed_outputs)
        leaves = [self.fixed_outputs[i] if i in self.fixed_outputs else next(rest) for i in range(count)]
        return pytree.tree_unflatten(leaves, self.outputs_spec)

    @property
    def dynamic(self) -> bool:
        """Whether other batch sizes may be fed."""
        return self.sizes[0] < self.sizes[1]

    def accepts(self, samples: int) -> bool:
        """Whether the graph holds for microbatches of so many samples."""
        return self.sizes[0] <= samples <= self.sizes[1]
