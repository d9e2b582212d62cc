"""plait trains a PyTorch model that was written for one device on many, and proves that it computes the same thing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.auto import parallelize as parallelize
    from plait.capture.job import Job as Job
    from plait.capture.keras.job import from_keras as from_keras
    from plait.capture.onnx.job import from_onnx as from_onnx
    from plait.capture.program import Program as Program
    from plait.capture.trace import trace as trace
    from plait.cost.step import estimate as estimate
    from plait.errors import PlaitError as PlaitError
    from plait.jobs.launch import launch as launch
    from plait.plan.search import search as search
    from plait.run.processes import spawn as spawn
    from plait.run.start import Run as Run
    from plait.run.start import start as start
    from plait.run.verify import verify as verify
    from plait.schema import Cluster as Cluster
    from plait.schema import Estimate as Estimate
    from plait.schema import Graph as Graph
    from plait.schema import Plan as Plan
    from plait.serve.export import export as export

__version__ = "0.1.0"

# Public name -> the module it lives in. torch is imported only when a name that needs it is used.
_HOME = {
    "Cluster": "plait.schema",
    "Estimate": "plait.schema",
    "Graph": "plait.schema",
    "Job": "plait.capture.job",
    "PlaitError": "plait.errors",
    "Plan": "plait.schema",
    "Program": "plait.capture.program",
    "Run": "plait.run.start",
    "estimate": "plait.cost.step",
    "from_keras": "plait.capture.keras.job",
    "from_onnx": "plait.capture.onnx.job",
    "export": "plait.serve.export",
    "launch": "plait.jobs.launch",
    "parallelize": "plait.auto",
    "search": "plait.plan.search",
    "spawn": "plait.run.processes",
    "start": "plait.run.start",
    "trace": "plait.capture.trace",
    "verify": "plait.run.verify",
}

__all__ = [
    "Cluster",
    "Estimate",
    "Graph",
    "Job",
    "PlaitError",
    "Plan",
    "Program",
    "Run",
    "estimate",
    "export",
    "from_keras",
    "from_onnx",
    "launch",
    "parallelize",
    "search",
    "spawn",
    "start",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'plait' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
