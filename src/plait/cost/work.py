"""What one device has to do for one segment: sums over its operators, before any rate is applied.

The same pass decides which operators tensor parallelism splits. In graph order a matmul on a whole input is
split by columns; one whose contracted dimension arrives split is split by rows and its result summed over the
group (an all-reduce); views, element-wise operators, softmax and attention carry the split along. With
sequence parallelism the all-reduce is a reduce-scatter and an all-gather of the same bytes, and what was whole
between them is split too (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from plait.schema.graph import DTYPE_BYTES, Graph, Operator, ParameterSpec, Segment, TensorSpec

__all__ = ["MODEL_KINDS", "Pass", "Split", "Work", "captured_bytes", "parameter_specs", "segment_work"]

_FLOAT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "fp4": 2}  # activations; fp8 keeps them in bf16
_TILE = {"gpu": 128, "tpu": 128, "npu": 128, "cpu": 16}  # rows and columns of one matmul tile; general knowledge
_FLOATS = ("float32", "bfloat16", "float16", "float64")
MODEL_KINDS = ("matmul", "attention", "conv")
"""Kinds of operators whose FLOP a utilisation counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The part of a plan that changes what one device does for a segment."""

    samples: float
    """In one microbatch."""
    tp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    ep: int = 1
    precision: str = "bf16"
    category: str = "gpu"
    keeps_gathered: bool = False
    """With sequence parallelism: whether a split matmul keeps its gathered input, or gathers it again."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Sums over the operators of a forward or a backward."""

    matmul_flops: float = 0.0
    """At the plan's precision, rounded up to whole tiles."""
    matmul_bytes: float = 0.0
    grouped_flops: float = 0.0
    """Of expert matmuls."""
    attention_flops: float = 0.0
    attention_bytes: float = 0.0
    memory_bytes: float = 0.0
    """Read and written by operators that do little arithmetic."""
    operators: float = 0.0
    """Kernels to launch."""

    def __add__(self, other: Pass) -> Pass:
        return Pass(
            self.matmul_flops + other.matmul_flops,
            self.matmul_bytes + other.matmul_bytes,
            self.grouped_flops + other.grouped_flops,
            self.attention_flops + other.attention_flops,
            self.attention_bytes + other.attention_bytes,
            self.memory_bytes + other.memory_bytes,
            self.operators + other.operators,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One segment on one device, for one microbatch."""

    forward: Pass
    backward: Pass
    again_selective: Pass
    """Forward work that is done again when only matmul and attention results are kept."""
    saved: float
    """Bytes kept for the backward, nothing recomputed."""
    saved_selective: float
    saved_full: float
    """Bytes of the segment's inputs."""
    transient: float
    """Bytes of the largest operator's inputs and outputs."""
    logits: float
    """Bytes that the loss adds for a moment: the logits and their gradient as the matmul has them, the gradient in fp32."""
    loss_kept: float
    """Part of `saved` that is the loss's own: the logits in fp32."""
    dense_parameters: float
    """Parameters that this device holds before fsdp: split by tp, experts not counted."""
    expert_parameters: float
    """Split by tp and ep."""
    model_flops: float
    """Forward and backward FLOP of matmul, attention and convolution on all devices of the microbatch."""
    tp_forward: tuple[float, ...]
    """Bytes of each all-reduce in the forward."""
    tp_backward: tuple[float, ...]
    tp_gathered: float
    """Bytes of all-gathers at places where a split tensor must be whole."""
    ep_bytes: float
    """Bytes that each of 4 all-to-alls (2 forward, 2 backward) exchanges."""
    cp_bytes: float
    """Bytes of keys and values that travel around the ring in a forward; twice that in a backward."""
    live_out: float
    """Bytes that a pipeline cut behind this segment sends."""
    frozen_dense: float = 0.0
    """Of `dense_parameters`, those that are not trained: no gradient, no optimizer state."""
    frozen_expert: float = 0.0

    @property
    def trained_dense(self) -> float:
        """Of `dense_parameters`, those that get a gradient."""
        return self.dense_parameters - self.frozen_dense

    @property
    def trained_expert(self) -> float:
        """Of `expert_parameters`, those that get a gradient."""
        return self.expert_parameters - self.frozen_expert


def captured_bytes(graph: Graph) -> int:
    """Bytes of a floating point value as the graph was captured."""
    for spec in graph.parameters:
        if spec.dtype in ("float32", "bfloat16", "float16", "float64"):
            return DTYPE_BYTES[spec.dtype]
    return 4


def _tiles(size: float, tile: int) -> float:
    """`size` rounded up to tiles, of which the smallest kernels have an eighth."""
    least = tile / 8
    return math.ceil(size / tile) * tile if size > tile / 2 else math.ceil(size / least) * least


@dataclass(slots=True)
class _Sums:
    matmul_flops: float = 0.0
    matmul_bytes: float = 0.0
    grouped_flops: float = 0.0
    attention_flops: float = 0.0
    attention_bytes: float = 0.0
    memory_bytes: float = 0.0
    operators: float = 0.0

    def done(self) -> Pass:
        return Pass(
            self.matmul_flops,
            self.matmul_bytes,
            self.grouped_flops,
            self.attention_flops,
            self.attention_bytes,
            self.memory_bytes,
            self.operators,
        )


def _is_expert(op: Operator) -> bool:
    return op.kind == "matmul" and "grouped_mm" in op.target


def parameter_specs(graph: Graph) -> dict[str, ParameterSpec]:
    """The graph's parameters by every name they have."""
    return {name: spec for spec in graph.parameters for name in (spec.name, *spec.aliases)}


def segment_work(
    graph: Graph, segment: Segment, split: Split, specs: Mapping[str, ParameterSpec] | None = None
) -> Work:
    """The sums for `segment` of `graph` on one device under `split`; `specs` saves looking the parameters up again."""
    return _Pass(graph, segment, split, specs if specs is not None else parameter_specs(graph)).run()


class _Pass:
    """One walk over a segment's operators in graph order."""

    def __init__(self, graph: Graph, segment: Segment, split: Split, specs: Mapping[str, ParameterSpec]) -> None:
        self.graph, self.segment, self.split = graph, segment, split
        self.captured = captured_bytes(graph)
        self.wide = _FLOAT_BYTES[split.precision]
        self.scale = split.samples / graph.batch / split.cp
        self.tile = _TILE.get(split.category, 128)
        self.shapes = specs
        self.whole_share = 1 / split.tp if split.sequence_parallel else 1.0
        self.forward, self.backward, self.again = _Sums(), _Sums(), _Sums()
        self.divided: set[str] = set()
        """Tensors that tp splits."""
        self.copied: set[str] = set()
        """Whole inputs of split matmuls: their gradients are summed over the group, once each."""
        self.tp_forward: list[float] = []
        self.tp_backward: list[float] = []
        self.gathered = self.ep_bytes = self.cp_bytes = 0.0
        self.saved = self.saved_selective = self.transient = self.logits = self.loss_kept = 0.0
        self.dense = self.expert = self.model_flops = 0.0
        self.frozen_dense = self.frozen_expert = 0.0
        self.counted: set[str] = set()

    def tensor(self, spec: TensorSpec) -> float:
        """Bytes of a tensor on this device at the plan's precision, before tp."""
        width = DTYPE_BYTES[spec.dtype]
        if spec.dtype in _FLOATS and width == self.captured:
            width = self.wide
        return spec.numel * width * self.scale

    def run(self) -> Work:
        for op in self.segment.operators:
            self.operator(op)
        t, segment = self.split.tp, self.segment
        if t > 1:
            self.gathered += sum(self.tensor(x) for x in segment.live_out if x.name in self.divided)
        live_in = sum(self.tensor(x) for x in segment.live_in) * self.whole_share
        live_out = sum(self.tensor(x) for x in segment.live_out) * self.whole_share
        if segment.equals == segment.index:  # parameters that no operator names
            own = set(segment.parameters) - self.counted
            unnamed = [s for n, s in self.shapes.items() if n in own]
            self.dense += sum(s.numel for s in unnamed)
            self.frozen_dense += sum(s.numel for s in unnamed if not s.trainable)
        if self.needs_no_backward():
            self.backward, self.tp_backward = _Sums(), []
        ep = self.split.ep
        return Work(
            forward=self.forward.done(),
            backward=self.backward.done(),
            again_selective=self.again.done(),
            saved=self.saved,
            saved_selective=min(self.saved, self.saved_selective + live_in),
            saved_full=min(self.saved, live_in) if live_in else self.saved,
            transient=self.transient,
            logits=self.logits,
            loss_kept=self.loss_kept,
            dense_parameters=self.dense,
            expert_parameters=self.expert,
            model_flops=self.model_flops,
            tp_forward=tuple(self.tp_forward),
            tp_backward=tuple(self.tp_backward),
            tp_gathered=self.gathered,
            ep_bytes=self.ep_bytes * (ep - 1) / ep,
            cp_bytes=self.cp_bytes,
            live_out=live_out,
            frozen_dense=self.frozen_dense,
            frozen_expert=self.frozen_expert,
        )

    def needs_no_backward(self) -> bool:
        """Whether nothing of the segment is trained and nothing before it: its matmuls run forward only."""
        flops = [op.backward_flops for op in self.segment.operators if op.kind in MODEL_KINDS and op.flops > 0]
        trained = any(self.shapes[n].trainable for n in self.segment.parameters if n in self.shapes)
        return bool(flops) and not any(flops) and not trained

    def operator(self, op: Operator) -> None:
        """Adds one operator."""
        arrives = any(x.name in self.divided for x in op.inputs)
        own = [name for name in op.parameters if name in self.shapes]
        weights = sum(self.shapes[name].numel for name in own if len(self.shapes[name].shape) >= 2)
        is_linear = op.kind == "matmul" and weights > 0
        share, result = self.place(op, is_linear=is_linear, arrives=arrives)
        if result:
            self.divided.update(x.name for x in op.outputs)
        self.count_parameters(op, own, is_linear=is_linear)
        if op.kind in MODEL_KINDS:
            self.model_flops += (op.flops + op.backward_flops) * self.split.samples / self.graph.batch
        if op.kind == "view":
            return
        outputs = sum(self.tensor(x) for x in op.outputs)
        inputs = sum(self.tensor(x) for x in op.inputs)
        if op.kind == "attention":
            self.count_attention(op, share, inputs + outputs)
        elif op.kind in ("matmul", "conv") and op.flops > 0:
            self.count_matmul(op, share, inputs, outputs, weights, is_linear=is_linear, arrives=arrives)
        else:
            self.count_memory(op, share, inputs, outputs, weights)
        self.forward.operators += 1
        self.backward.operators += 2 if is_linear else 1
        self.count_saved(op, share, outputs, is_linear=is_linear, arrives=arrives, result=result)

    def place(self, op: Operator, *, is_linear: bool, arrives: bool) -> tuple[float, bool]:
        """(share of the operator on this device, whether tp splits its result); notes its collectives."""
        t = self.split.tp
        if t == 1:
            return 1.0, False
        if is_linear:
            if arrives:
                self.tp_forward.append(sum(self.tensor(x) for x in op.outputs))
                return 1 / t, False
            if op.inputs and op.inputs[0].name not in self.copied:
                self.copied.add(op.inputs[0].name)
                self.tp_backward.append(self.tensor(op.inputs[0]))
            return 1 / t, True
        if op.kind == "embedding":
            self.tp_forward.append(sum(self.tensor(x) for x in op.outputs))
            return 1 / t, False
        if op.kind == "conv":
            self.gathered += sum(self.tensor(x) for x in op.inputs if x.name in self.divided)
            return 1.0, False
        if arrives:
            return 1 / t, op.kind != "loss"
        return (1.0 if op.kind in MODEL_KINDS else self.whole_share), False

    def count_parameters(self, op: Operator, own: list[str], *, is_linear: bool) -> None:
        """Adds the parameters that no earlier operator used; views leave them to who computes with them."""
        if op.kind == "view":
            return
        t = self.split.tp
        for name in own:
            if name in self.counted:
                continue
            self.counted.add(name)
            spec = self.shapes[name]
            if _is_expert(op):
                held = spec.numel / t / self.split.ep
                self.expert += held
                self.frozen_expert += 0.0 if spec.trainable else held
                continue
            split = (is_linear or op.kind == "embedding") and len(spec.shape) >= 2
            held = spec.numel / t if split else spec.numel
            self.dense += held
            self.frozen_dense += 0.0 if spec.trainable else held

    def count_attention(self, op: Operator, share: float, moved: float) -> None:
        """Adds fused attention; keys and values travel over cp."""
        self.forward.attention_flops += op.flops * self.scale * share
        self.backward.attention_flops += op.backward_flops * self.scale * share
        self.forward.attention_bytes += moved * share
        self.backward.attention_bytes += 2 * moved * share
        if len(op.inputs) >= 3:
            self.cp_bytes += sum(self.tensor(x) for x in op.inputs[1:3]) * share * (self.split.cp - 1)

    def count_matmul(self, op: Operator, share: float, inputs: float, outputs: float, weights: int, *, is_linear: bool,
                     arrives: bool) -> None:  # fmt: skip
        """Adds a matmul or convolution; its backward makes two of the same size."""
        t, split = self.split.tp, self.split
        nbytes = weights * self.wide / t / (split.ep if _is_expert(op) else 1)
        if is_linear:
            nbytes += inputs * (1 / t if arrives else 1) + outputs * (1 if arrives else 1 / t)
        else:
            nbytes += (inputs + outputs) * share
        flops = op.flops * self.scale * share
        flops *= _tile_loss(op, split, self.scale, self.tile, is_linear=is_linear, arrives=arrives)
        ratio = op.backward_flops / op.flops
        if _is_expert(op):
            self.forward.grouped_flops += flops
            self.backward.grouped_flops += flops * ratio
            if split.ep > 1:
                moved = self.tensor(op.inputs[0]) if not arrives else 0.0
                self.ep_bytes = max(self.ep_bytes, moved)
        else:
            self.forward.matmul_flops += flops
            self.backward.matmul_flops += flops * ratio
        self.forward.matmul_bytes += nbytes
        self.backward.matmul_bytes += min(2.0, ratio) * nbytes  # one multiply for each operand that needs a gradient
        if not is_linear:  # scores and weighted sum of unfused attention
            self.again.matmul_flops += flops
            self.again.matmul_bytes += nbytes
            self.again.operators += 1

    def count_memory(self, op: Operator, share: float, inputs: float, outputs: float, weights: int) -> None:
        """Adds an operator that does little arithmetic: its time is what it reads and writes."""
        if op.kind == "embedding":
            moved = 2 * outputs  # only the rows looked up are read
        else:
            moved = inputs + outputs + weights * self.wide
        if op.kind == "loss" and self.wide < 4 and self.captured == 4:
            moved *= 4 / self.wide  # computed in fp32 at any precision
        self.forward.memory_bytes += moved * share
        self.backward.memory_bytes += 1.5 * moved * share  # reads the gradient and what was kept, writes a gradient
        self.again.memory_bytes += moved * share
        self.again.operators += 1
        self.transient = max(self.transient, moved * share)
        if op.kind == "loss":
            elements = max((x.numel for x in op.inputs), default=0) * self.scale * share
            self.logits += elements * (4 + (2 * self.wide if self.wide < 4 else 0))

    def count_saved(self, op: Operator, share: float, outputs: float, *, is_linear: bool, arrives: bool,
                    result: bool) -> None:  # fmt: skip
        """Adds what the backward needs. Split inputs are kept in part, whole ones whole (but for sequence parallel)."""
        width = self.wide / self.captured
        if op.kind == "loss" and self.captured == 4:
            width = 1.0
        whole = is_linear and not arrives and self.split.keeps_gathered
        part = 1 / self.split.tp if (arrives or self.split.sequence_parallel) and not whole else 1.0
        self.saved += op.saved_bytes * self.scale * width * part
        if op.kind == "loss":
            self.loss_kept += op.saved_bytes * self.scale * width * part
        if op.kind in ("attention", "conv") or is_linear:
            self.saved_selective += outputs * (
                1 / self.split.tp
                if result or self.split.sequence_parallel
                else share
                if op.kind == "attention"
                else 1.0
            )


def _tile_loss(op: Operator, split: Split, scale: float, tile: int, *, is_linear: bool, arrives: bool) -> float:
    """FLOP in whole tiles over FLOP: a matmul of 100 rows costs as much as one of 128."""
    if op.gemm is None:
        return 1.0
    _, m, n, k = op.gemm
    rows, columns, depth = float(m), float(n), float(k)
    if is_linear:
        rows = m * scale * (split.ep if _is_expert(op) else 1)
        columns /= 1 if arrives else split.tp
        depth /= split.tp if arrives else 1
    return _tiles(rows, tile) / rows * (_tiles(columns, tile) / columns) * (_tiles(depth, max(tile // 4, 1)) / depth)
