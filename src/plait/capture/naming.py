"""Names of other frameworks' weights as torch's: `dense/kernel:0` cannot be an attribute."""

from __future__ import annotations

import re

import torch
from torch import nn

__all__ = ["register"]


def register(module: nn.Module, name: str, tensor: torch.Tensor, *, kind: str, separators: str = ".") -> str:
    """Put a tensor under `name`, its parts as submodules, and give the name it has there.

    `kind` is "parameter", "frozen" (a parameter without a gradient) or "buffer". What an attribute's name may not hold
    becomes an underscore; a name that is taken, or that torch.nn.Module has itself, gets one behind it.
    """
    parts = [re.sub(r"\W", "_", part) for part in re.split(f"[{re.escape(separators)}]", name)]
    *path, leaf = [part for part in parts if part] or ["weight"]
    owner, done = module, []
    for part in path:
        here = part if part in owner._modules else _free(owner, part)
        if here not in owner._modules:
            owner.add_module(here, nn.Module())
        owner = owner.get_submodule(here)
        done.append(here)
    leaf = _free(owner, leaf)
    if kind == "buffer":
        owner.register_buffer(leaf, tensor)
    else:
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=kind == "parameter"))
    return ".".join([*done, leaf])


def _free(owner: nn.Module, name: str) -> str:
    taken = {*owner._parameters, *owner._buffers, *owner._modules, *owner.__dict__}
    while name in taken or hasattr(nn.Module, name):
        name += "_"
    return name
