"""Whether a model can be held here at all, before its values are made."""

from __future__ import annotations

import os

from torch import nn

from plait.errors import PlanError
from plait.run.world import World
from plait.schema import Plan
from plait.units import format_bytes

__all__ = ["refuse_too_large"]

TRAINING = 4
"""Copies of a parameter's bytes while training: value, gradient, and Adam's two moments, which is the usual case."""

REFERENCE = 12
"""The same of one device's run beside it: start, gradients and result in its own precision, and all of it in float64."""


def refuse_too_large(
    module: nn.Module, plan: Plan, world: World, *, with_reference: bool = False, train: bool = True
) -> None:
    """Compare what the processes of this computer will hold of parameters with its memory (CPU runs only).

    Activations come on top and are not counted, so that nothing is refused that could run.

    Raises:
        PlanError: the parameters alone do not fit.
    """
    if world.device.type != "cpu":
        return
    bytes_once = sum(p.numel() * p.element_size() for p in module.parameters())
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    need = bytes_once * (TRAINING if train else 1) * here / (plan.fsdp * plan.tp * plan.pp)
    need += bytes_once * (REFERENCE if train else 1) if with_reference else 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > memory:
        what = "training it" if train else "serving it"
        what += " and one device's run beside it" if with_reference else ""
        parts = "parameters, gradients and optimizer" if train else "parameters"
        raise PlanError(
            f"plan: the model has {format_bytes(bytes_once)} of parameters; {what} on {here} processes of this computer "
            f"needs {format_bytes(need)} for {parts} alone, it has {format_bytes(memory)}",
            hint="make the model smaller (for hf: targets e.g. ?num_hidden_layers=2&hidden_size=256), or shard it over "
            "more computers",
        )
