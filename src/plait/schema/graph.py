"""The captured model, free of torch: what the cost model reads, the search cuts and the runtime executes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from plait.schema.records import Record

__all__ = ["DTYPE_BYTES", "Graph", "Operator", "ParameterSpec", "Segment", "TensorSpec"]

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec(Record):
    """A tensor's name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterSpec(Record):
    """One stored parameter; tied parameters are one, under the first name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True
    aliases: tuple[str, ...] = ()
    """The other names under which the model knows the same storage."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator(Record):
    """One operator of the forward pass at the captured batch size."""

    name: str
    target: str
    """torch's own name, such as `aten.linear.default`."""
    kind: str
    """matmul, attention, conv, norm, softmax, loss, embedding, elementwise, reduction, random, view, scatter or other."""
    module: str
    """Path of the user's module it came from, '' at the top."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: tuple[str, ...] = ()
    flops: float = 0.0
    """Forward, multiply and add counted as two; attention in full (no causal discount)."""
    backward_flops: float = 0.0
    read_bytes: int = 0
    """Bytes read by the forward if each input is read once; 0 for views."""
    write_bytes: int = 0
    saved_bytes: int = 0
    """Bytes kept alive for the backward that no earlier operator keeps already (parameters not counted)."""
    gemm: tuple[int, int, int, int] | None = None
    """(batch, m, n, k) of a matrix multiply or an attention's score product: batch x [m, k] @ [k, n]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment(Record):
    """A run of operators between two places where few bytes are live.

    At once the unit of pipeline stages, of FSDP wrapping, of recomputation and of cost.
    """

    index: int
    name: str
    """The user's module that covers most of it, for reading."""
    operators: tuple[Operator, ...]
    parameters: tuple[str, ...]
    """Names (`ParameterSpec.name`) used here; a tied parameter is named in every segment that uses it."""
    live_in: tuple[TensorSpec, ...]
    """Tensors that cross the boundary into this segment (used here or passed on), model inputs not counted."""
    live_out: tuple[TensorSpec, ...]
    equals: int
    """Index of the first segment with the same structure (operators, shapes, parameter shapes)."""

    @property
    def flops(self) -> float:
        """Forward FLOP."""
        return sum(op.flops for op in self.operators)

    @property
    def backward_flops(self) -> float:
        """Backward FLOP, nothing recomputed."""
        return sum(op.backward_flops for op in self.operators)

    @property
    def saved_bytes(self) -> int:
        """Bytes kept for the backward without recomputation."""
        return sum(op.saved_bytes for op in self.operators)

    @property
    def live_in_bytes(self) -> int:
        """Bytes that cross into this segment: what a pipeline cut in front of it sends."""
        return sum(t.nbytes for t in self.live_in)

    @property
    def live_out_bytes(self) -> int:
        """Bytes that cross out of this segment."""
        return sum(t.nbytes for t in self.live_out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph(Record):
    """A model's forward and loss at one microbatch size, as a chain of segments."""

    name: str
    batch: int
    """Samples in the captured microbatch; FLOPs, bytes and shapes are for this many."""
    tokens_per_sample: int
    """Positions per sample that a rate in tokens counts (1 where a sample has no sequence)."""
    inputs: tuple[TensorSpec, ...]
    parameters: tuple[ParameterSpec, ...]
    buffers: tuple[ParameterSpec, ...]
    segments: tuple[Segment, ...]

    def parameter(self, name: str) -> ParameterSpec:
        """The parameter called `name`.

        Raises:
            KeyError: there is none.
        """
        for spec in self.parameters:
            if spec.name == name or name in spec.aliases:
                return spec
        raise KeyError(name)

    @property
    def flops(self) -> float:
        """Forward FLOP for `batch` samples."""
        return sum(segment.flops for segment in self.segments)

    @property
    def numel(self) -> int:
        """Parameters, tied ones once."""
        return sum(spec.numel for spec in self.parameters)
