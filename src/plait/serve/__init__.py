"""Trained models, exported to the runtimes that people serve with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.serve.served import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module 'plait.serve' has no attribute {name!r}")
    from plait.serve.served import load

    return load
