"""Which of a file's constants are weights to train: the file does not say, so the data flow does.

    a constant ...                                                       becomes
    meets data in MatMul, Gemm, Conv, ConvTranspose, Einsum, LSTM, GRU, RNN      a parameter
    is scale or shift of a norm, the slope of a PRelu                            a parameter
    is a table in which the data look up rows (Gather)                           a parameter
    is added to, multiplied with or put beside what came from a parameter,       a parameter
        and has more than one element (biases, scales, class tokens, positions)
    is a batch norm's running mean or variance                                   a buffer, updated while training
    anything else: sizes, axes, single numbers, masks (0 and -10000 or less,     a buffer, or a number in the graph
        0 and 1), what meets the raw input (means and deviations of pixels),
        what meets only positions (rotary frequencies)

"Meets" also through Transpose, Reshape, Cast and so on of the constant alone. Two tables of which one is the other
transposed, number by number, are one parameter: exporters write a tied output layer so.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from plait.capture.onnx.graph import OnnxFile, OnnxNode
from plait.errors import TargetError

__all__ = ["Roles", "find_roles"]

# Slots of weights; the others are data.
_LINEAR = {
    "MatMul": (0, 1),
    "Gemm": (0, 1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Einsum": (0, 1, 2, 3),
    "LSTM": (1, 2, 3),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
}
_NORM = {
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "PRelu": (1,),
}
_MICROSOFT = {
    "FusedMatMul": (0, 1),
    "FusedGemm": (0, 1, 2),
    "FusedConv": (1, 2),
    "Attention": (1, 2),
    "MultiHeadAttention": (3,),
    "EmbedLayerNormalization": (2, 3, 4, 5, 6),
    "SkipLayerNormalization": (2, 3, 4),
    "SkipSimplifiedLayerNormalization": (2, 3),
    "BiasGelu": (1,),
    "FastGelu": (1,),
    "DynamicQuantizeMatMul": (1, 4),
    "MatMulIntegerToFloat": (1, 6),
}
# Of whole numbers, which become numbers of floating type.
_INTEGER = {"MatMulInteger": (0, 1), "ConvInteger": (1,)}
_BESIDE = ("Add", "Sub", "Mul", "Div", "Sum", "Concat", "Where")
_MASKED = -1e4  # added to scores before a softmax, from here down it is a mask (float16's smallest is -65504)


@dataclass(slots=True)
class Roles:
    """What each constant is."""

    parameters: list[str] = field(default_factory=list)
    """Names, in the file's order."""
    statistics: set[str] = field(default_factory=set)
    """Running means and variances."""
    transposed: dict[str, str] = field(default_factory=dict)
    """A parameter -> the one that it is the transpose of."""


def find_roles(file: OnnxFile, *, train: Sequence[str] = (), fixed: Sequence[str] = ()) -> Roles:
    """The roles of the file's constants; `train` and `fixed` are patterns of names (`*.inv_freq`) that say otherwise.

    Raises:
        TargetError: a pattern matches nothing, or nothing of floating type.
    """
    flow = _Flow(file)
    for node in _flat(file.nodes):
        flow.follow(node)
    chosen = (flow.found | _matching(file, train, "train")) - _matching(file, fixed, "fixed")
    roles = Roles([name for name in file.constants if name in chosen], flow.statistics - chosen)
    roles.transposed = _transposed(file, roles.parameters)
    return roles


def _flat(nodes: Iterable[OnnxNode]) -> Iterator[OnnxNode]:
    """The nodes with those inside control flow before the node itself, and what goes in and out of them joined by names."""
    for node in nodes:
        inner = list(node.inputs)
        for body in node.bodies.values():
            first = {"Loop": 2, "Scan": len(node.inputs)}.get(node.op, 0)
            joined = [*([""] * first), *inner[first:]] if node.op == "Loop" else inner
            came = {name: one.inputs[0] for one in body.nodes if one.op == "Identity" for name in one.outputs}
            given_on = {came.get(name, name) for name in body.outputs}
            for name, outer in zip(body.inputs, joined, strict=False):
                # What is carried from round to round is data, even where it starts as a constant; what comes out as it
                # went in is the same in every round (tf2onnx hands weights into a loop so).
                op = "Identity" if outer and name in given_on else "Carried"
                yield _joined(node, op, (outer,) if outer else (), (name,))
            yield from _flat(body.nodes)
        if not node.bodies:
            yield node
            continue
        outputs = [body.outputs[1:] if node.op == "Loop" else body.outputs for body in node.bodies.values()]
        for names, out in zip(zip(*outputs, strict=False), node.outputs, strict=False):
            yield _joined(node, "Merged", names, (out,))


def _joined(node: OnnxNode, op: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> OnnxNode:
    return replace(node, op=op, domain="", inputs=inputs, outputs=outputs, bodies={}, captured=(), attributes={})


def _is_float(array: np.ndarray[Any, Any]) -> bool:
    return np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"


def _matching(file: OnnxFile, patterns: Iterable[str], option: str) -> set[str]:
    names = [name for name, array in file.constants.items() if _is_float(array)]
    found: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise TargetError(f"{file.path}: {option}={pattern} matches no constant of floating type")
        found.update(matched)
    return found


class _Flow:
    """Follows the nodes in order."""

    def __init__(self, file: OnnxFile) -> None:
        self.found: set[str] = set()
        self.statistics: set[str] = set()
        self._constants = file.constants
        # Value -> the constants that it is made of and of nothing else.
        self._made_of: dict[str, frozenset[str]] = {name: frozenset([name]) for name in file.constants}
        self._live = {value.name for value in file.inputs if np.issubdtype(value.dtype, np.floating)}
        self._learned: set[str] = set()
        self._linear: set[str] = set()

    def follow(self, node: OnnxNode) -> None:
        """Give the node's constants their roles, then say what its outputs are."""
        given = [name for name in node.inputs if name]
        if node.op == "Carried":
            self._live.update(node.outputs)
            if any(name in self._learned or self._made_of.get(name, frozenset()) & self.found for name in given):
                self._learned.update(node.outputs)
            return
        if node.op in ("Shape", "Size") or all(name in self._made_of for name in given):
            of = frozenset() if node.op in ("Shape", "Size") else frozenset().union(*(self._made_of[n] for n in given))
            self._made_of.update(dict.fromkeys(node.outputs, of))
            return
        before = len(self.found)
        self._roles(node)
        own = {name for name in given if self._made_of.get(name, frozenset()) & self.found}
        learned = len(self.found) > before or own or any(name in self._learned for name in given)
        if learned:
            self._learned.update(node.outputs)
        if learned or any(name in self._live for name in given):
            self._live.update(node.outputs)
        if node.op in _LINEAR or node.op in _MICROSOFT or node.op in _INTEGER:
            self._linear.update(node.outputs)

    def _roles(self, node: OnnxNode) -> None:
        data = [name for name in node.inputs if name and name not in self._made_of]
        live = any(name in self._live for name in data)
        learned = any(name in self._learned for name in data)
        if node.op in _NORM:
            self._take(node, _NORM[node.op])
            if node.op == "BatchNormalization":
                for name in node.inputs[3:5]:
                    self.statistics |= self._made_of.get(name, frozenset())
        elif node.domain == "com.microsoft" and node.op in _MICROSOFT:
            self._take(node, _MICROSOFT[node.op])
        elif node.op in _INTEGER and (live or learned):
            self._take(node, _INTEGER[node.op], is_whole=True)
        elif node.domain == "" and node.op in _LINEAR and (live or learned):
            self._take(node, _LINEAR[node.op])
        elif node.op == "Gather" and node.attributes.get("axis", 0) == 0 and node.inputs[1] in data:
            self._take(node, (0,), least_rank=2)
        elif node.op in _BESIDE and learned:
            after_linear = any(name in self._linear for name in data)
            for slot, name in enumerate(node.inputs):
                if self._beside(name, after_linear=after_linear and node.op == "Add"):
                    self._take(node, (slot,))

    def _take(self, node: OnnxNode, slots: tuple[int, ...], least_rank: int = 0, *, is_whole: bool = False) -> None:
        for slot in slots:
            name = node.inputs[slot] if slot < len(node.inputs) else ""
            for constant in self._made_of.get(name, frozenset()):
                array = self._constants[constant]
                fits = (np.issubdtype(array.dtype, np.integer) and array.ndim > 1) if is_whole else _is_float(array)
                if fits and array.ndim >= least_rank and array.size:
                    self.found.add(constant)

    def _beside(self, name: str, *, after_linear: bool) -> bool:
        """Whether a constant beside learned values is a weight itself."""
        arrays = [self._constants[constant] for constant in self._made_of.get(name, frozenset())]
        floats = [array for array in arrays if _is_float(array)]
        for array in floats:
            if array.ndim == 0 or _is_mask(array):
                return False
            if array.size == 1 and not (after_linear and array.ndim == 1):
                return False
        return bool(floats)


def _is_mask(array: np.ndarray[Any, Any]) -> bool:
    values = array.astype(np.float64)
    low = values <= _MASKED
    if low.any():
        return bool((low | (values == 0)).all())
    return array.ndim >= 2 and bool(((values == 0) | (values == 1)).all()) and 0 < values.sum() < values.size


def _transposed(file: OnnxFile, names: list[str]) -> dict[str, str]:
    """Of two matrices that are each other's transpose, the later is seen through the earlier."""
    seen: dict[tuple[Any, ...], str] = {}
    found = {}
    for name in names:
        array = file.constants[name]
        if array.ndim != 2 or array.size < 2 or bool((array == array.flat[0]).all()):
            continue
        turned = (array.dtype.name, array.shape[::-1], _digest(array.T))
        if turned in seen and array.shape[0] != array.shape[1]:
            found[name] = seen[turned]
            continue
        seen.setdefault((array.dtype.name, array.shape, _digest(array)), name)
    return found


def _digest(array: np.ndarray[Any, Any]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
