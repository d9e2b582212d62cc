"""The table that the families of rules fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from plait.run.shard.operation import Rule

__all__ = ["TABLE", "rule"]

TABLE: dict[Any, Rule] = {}
"""Operator overload (or Python function) to its rule; filled once, on import."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule for ATen operators; a name without overload means all overloads, one that does not exist none."""

    def enter(function: Rule) -> Rule:
        for name in names:
            packet_name, _, overload = name.partition(".")
            packet = getattr(torch.ops.aten, packet_name, None)
            if packet is None:
                continue
            for each in [overload] if overload else packet.overloads():
                if hasattr(packet, each):
                    TABLE[getattr(packet, each)] = function
        return function

    return enter
