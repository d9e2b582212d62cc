"""The user's model, built: whole when it came as a module, without its large values when it came as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from plait.capture.job import Job
from plait.errors import TargetError

__all__ = ["Built", "build"]


@dataclass
class Built:
    """A model whose tensors are handed out one by one."""

    module: nn.Module
    """Its large parameters may be empty: shapes, dtypes and names are right, values are not to be read."""
    value: Callable[[str], torch.Tensor]
    """Full value of a parameter or buffer by name: that which one device has from the same seed."""

    def changed(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Built:
        """The same model with other initial values of its parameters: change(name, value)."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))

        def value(name: str) -> torch.Tensor:
            return change(name, self.value(name)) if name in parameters else self.value(name)

        return Built(self.module, value)

    def trains(self, name: str) -> bool:
        """Whether a parameter requires a gradient."""
        return self.module.get_parameter(name).requires_grad


def build(job: Job, *, seed: int, values: bool) -> Built:
    """The job's model. `values=False` when only its structure is wanted (capture).

    Raises:
        TargetError: the function gives no module, or the module has no parameter.
    """
    if isinstance(job.model, nn.Module):
        module = job.model
    else:
        torch.manual_seed(seed)
        module = job.model()
        if not isinstance(module, nn.Module):
            raise TargetError(f"job: model() gave a {type(module).__name__}, not a torch.nn.Module")
    if not any(True for _ in module.parameters()):
        raise TargetError("job: the model has no parameters", hint="there is nothing to train")
    named = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    return Built(module, lambda name: named[name].detach())
