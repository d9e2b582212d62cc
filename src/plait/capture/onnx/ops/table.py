"""The table of operators: (domain, name) -> function(call, *inputs)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["OPERATORS", "Operator", "operator"]


@dataclass(frozen=True, slots=True)
class Operator:
    """How one operator is carried out."""

    function: Callable[..., Any]
    """(call, *inputs) -> a value, or a tuple of them where it has several outputs."""
    raw: bool
    """Whether it takes host arrays as they are; otherwise they become tensors first."""


OPERATORS: dict[tuple[str, str], Operator] = {}


def operator(*names: str, raw: bool = False, domain: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function under its operators' names."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            OPERATORS[domain, name] = Operator(function, raw)
        return function

    return enter
