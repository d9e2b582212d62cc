"""bf16 by autocast, with fp32 master weights; regions where the user switched autocast off stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

from plait.schema import Plan

__all__ = ["autocast_for", "leave_to_autocast"]


def autocast_for(plan: Plan, device: torch.device) -> AbstractContextManager[Any]:
    """The context a forward runs in."""
    if plan.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def leave_to_autocast(plan: Plan) -> Callable[[fx.Node], None]:
    """A rewrite of graph nodes that the model ran with autocast disabled: they stay so under a bf16 plan."""

    def rewrite(node: fx.Node) -> None:
        if plan.precision != "fp32" and node.op == "call_function" and node.meta.get("no_autocast"):
            node.target = _WithoutAutocast(node.target)

    return rewrite


class _WithoutAutocast:
    def __init__(self, operator: Any) -> None:
        self._operator = operator
        self.__name__ = self.__qualname__ = "without_autocast"
        self.__module__ = __name__

    def __deepcopy__(self, memo: Any) -> _WithoutAutocast:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kinds = {a.device.type for a in args if isinstance(a, torch.Tensor)} or {"cpu"}
        with torch.autocast(kinds.pop(), enabled=False):
            return self._operator(*args, **kwargs)
