"""plait trains a PyTorch model that was written for one device on many, and proves that it computes the same thing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.capture.job import Job as Job
    from plait.errors import PlaitError as PlaitError
    from plait.schema import Graph as Graph
    from plait.schema import Plan as Plan

__version__ = "0.1.0"

# Public name -> the module it lives in. torch is imported only when a name that needs it is used.
_HOME = {
    "Graph": "plait.schema",
    "Job": "plait.capture.job",
    "Plan": "plait.schema",
    "PlaitError": "plait.errors",
}

__all__ = ["Graph", "Job", "PlaitError", "Plan"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'plait' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
