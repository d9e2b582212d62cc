"""A checked ONNX graph: what the reader hands to the importer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Body", "GraphInput", "OnnxFile", "OnnxNode", "every"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphInput:
    """What the model is given."""

    name: str
    dtype: Any
    """numpy's dtype."""
    shape: tuple[int | str, ...]
    """A number where the file fixes the size, else the dimension's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """A graph inside a node of control flow."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[OnnxNode, ...]
    """In order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxNode:
    """One operator."""

    name: str
    """Its own name, or its first output's where it has none."""
    op: str
    domain: str
    inputs: tuple[str, ...]
    """Empty text where an optional input is left out."""
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    """int, float, str, bytes, numpy array, or a list of these."""
    opset: int
    bodies: dict[str, Body] = field(default_factory=dict)
    """Graphs inside, by attribute (`then_branch`, `body`)."""
    captured: tuple[str, ...] = ()
    """Values from outside that those graphs use."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Inputs that are given, and what the graphs inside use."""
        return (*filter(None, self.inputs), *self.captured)

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.domain + '.' if self.domain else ''}{self.op})"


@dataclass(kw_only=True, slots=True)
class OnnxFile:
    """A checked model."""

    path: Path
    opset: int
    producer: str
    inputs: list[GraphInput]
    outputs: list[str]
    constants: dict[str, np.ndarray[Any, Any]]
    """Initializers and constants by name; bfloat16 as ml_dtypes has it."""
    nodes: list[OnnxNode] = field(default_factory=list)
    """Every node after those that make its inputs; what no output needs is left out."""


def every(nodes: Iterable[OnnxNode]) -> Iterator[OnnxNode]:
    """The nodes and those of the graphs inside them."""
    for node in nodes:
        yield node
        for body in node.bodies.values():
            yield from every(body.nodes)
