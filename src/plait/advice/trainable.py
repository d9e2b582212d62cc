"""A graph of which only a part is trained: adapters, a fraction, or parameters whose names match.

    all            the graph as it is
    lora:rank=16   every matrix of a matmul is frozen and gets two thin ones beside it (Hu et al. 2021, arXiv 2106.09685)
    0.01, 1%       the last parameters, so many that they are that fraction: what is nearest to the loss is trained
    PATTERN        parameters whose names match (`*.lm_head.*`, `*bias`); several with `|`

What follows from it is written into the graph, so that every reader of it agrees: a frozen matmul makes no gradient of its
weights (half of its backward), and keeps no input for it; nothing at all runs backward before the first trained parameter.
Activations that the way back to it needs stay. Known error: kept bytes are dropped for matmuls alone; what else a frozen
layer keeps for its own weights (a norm's input) is still counted.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import replace

from plait.errors import RequestError
from plait.schema.graph import DTYPE_BYTES, Graph, Operator, ParameterSpec, Segment, TensorSpec

__all__ = ["freeze", "lora", "with_trainable"]

_HINT = "write all, lora:rank=16, a fraction such as 0.01 or 1%, or a pattern such as '*lm_head*'"
_LARGEST_RANK = 4096


def with_trainable(graph: Graph, choice: str) -> Graph:
    """`graph` with `choice` of its parameters trained.

    Raises:
        RequestError: the choice is malformed, or nothing would be trained.
    """
    word = choice.strip()
    if word == "all":
        return graph
    if word.lower().startswith("lora"):
        return lora(graph, _rank(word))
    share = _fraction(word)
    if share is not None:
        return freeze(graph, _last(graph, share))
    names = {spec.name for spec in graph.parameters}
    patterns = [piece for piece in word.split("|") if piece]
    kept = {name for name in names if any(fnmatch.fnmatchcase(name, piece) for piece in patterns)}
    if not kept:
        near = difflib.get_close_matches(word.strip("*"), names, n=3, cutoff=0.3)
        raise RequestError(
            f"--trainable {choice!r} matches no parameter of {graph.name}",
            hint=(f"nearest: {', '.join(near)}; " if near else "") + _HINT,
        )
    return freeze(graph, kept)


def _rank(word: str) -> int:
    """The rank in `lora:rank=16` (16 where none is said)."""
    _, _, rest = word.partition(":")
    name, _, value = (rest or "rank=16").partition("=")
    if name.strip() not in ("rank", "r") or not value.strip().isdigit() or not 1 <= int(value) <= _LARGEST_RANK:
        raise RequestError(f"--trainable {word!r}: rank must be a whole number from 1 to {_LARGEST_RANK}", hint=_HINT)
    return int(value)


def _fraction(word: str) -> float | None:
    """The fraction that `word` states; None where it is no number."""
    try:
        value = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        return None
    if not 0 < value <= 1:
        raise RequestError(f"--trainable {word} is not a fraction above 0 and at most 1", hint=_HINT)
    return value


def _last(graph: Graph, share: float) -> set[str]:
    """Names of the last parameters that are at least `share` of all."""
    wanted, names = share * graph.numel, set[str]()
    for spec in reversed(graph.parameters):
        if wanted <= 0:
            break
        names.add(spec.name)
        wanted -= spec.numel
    return names


def freeze(graph: Graph, trained: set[str]) -> Graph:
    """`graph` with only the parameters called `trained` trained; FLOP and kept bytes of the backward follow from it."""
    parameters = tuple(replace(p, trainable=p.trainable and p.name in trained) for p in graph.parameters)
    state = {name: p.trainable for p in parameters for name in (p.name, *p.aliases)}
    reached: set[str] = set()
    segments: list[Segment] = []
    seen: dict[object, int] = {}
    before = None
    for segment in graph.segments:
        _enter(before, segment, reached)
        before = segment
        operators = tuple(_frozen(op, state, reached) for op in _own_names(graph, segment))
        trains = tuple(state.get(n, False) for n in segment.parameters)
        key = (segment.equals, trains, tuple((op.backward_flops, op.saved_bytes) for op in operators))
        segments.append(replace(segment, operators=operators, equals=seen.setdefault(key, segment.index)))
    return replace(graph, parameters=parameters, segments=tuple(segments))


def _enter(before: Segment | None, segment: Segment, reached: set[str]) -> None:
    """Carries over the border what needs a gradient: records that several segments share name their inputs otherwise."""
    for out, name in zip(before.live_out if before else (), segment.live_in, strict=False):
        if out.name in reached:
            reached.add(name.name)
        elif out.name != name.name:
            reached.discard(name.name)


def _own_names(graph: Graph, segment: Segment) -> list[Operator]:
    """The operators with the segment's own parameters, also where its record is shared with the segment it equals."""
    if all(name in segment.parameters for op in segment.operators for name in op.parameters):
        return list(segment.operators)
    names = dict(zip(graph.segments[segment.equals].parameters, segment.parameters, strict=False))
    return [replace(op, parameters=tuple(names.get(n, n) for n in op.parameters)) for op in segment.operators]


def _frozen(op: Operator, state: Mapping[str, bool], reached: set[str]) -> Operator:
    """`op` with the backward that is left; `reached` are the tensors that need a gradient, and grows."""
    trained = [state.get(name, False) for name in op.parameters]
    upstream = any(x.name in reached for x in op.inputs)
    if upstream or any(trained):
        reached.update(x.name for x in op.outputs)
    if not (upstream or any(trained)):
        return replace(op, backward_flops=0.0, saved_bytes=0) if op.backward_flops or op.saved_bytes else op
    if op.kind not in ("matmul", "conv") or not op.parameters or op.flops <= 0:
        return op
    halves = (1 if any(trained) else 0) + (1 if upstream else 0)
    backward = min(op.backward_flops, halves * op.flops)
    if any(trained):
        return replace(op, backward_flops=backward)
    # Its input is kept for the gradient of its weights alone; what another operator keeps of it is counted there.
    return replace(op, backward_flops=backward, saved_bytes=0)


def lora(graph: Graph, rank: int) -> Graph:
    """`graph` frozen, with two matrices of `rank` beside each one that a matmul multiplies with.

    The adapters' arithmetic, their kept inputs (the layer's input and the thin product) and their parameters are added;
    their sum with the layer's own output is left to a fused kernel.

    Raises:
        RequestError: no matmul has a matrix to adapt.
    """
    specs = {name: p for p in graph.parameters for name in (p.name, *p.aliases)}
    size = DTYPE_BYTES.get(graph.parameters[0].dtype, 2) if graph.parameters else 2
    frozen = tuple(replace(p, trainable=False) for p in graph.parameters)
    added: dict[str, ParameterSpec] = {}
    segments: list[Segment] = []
    reached: set[str] = set()
    state = dict.fromkeys(specs, False)
    seen: dict[object, int] = {}
    before = None
    for segment in graph.segments:
        _enter(before, segment, reached)
        before = segment
        operators: list[Operator] = []
        own = list(segment.parameters)
        for op in _own_names(graph, segment):
            weight = _adapted(op, specs)
            if weight is None:
                operators.append(_frozen(op, state, reached))
                continue
            upstream = any(x.name in reached for x in op.inputs)
            operators.append(_frozen(op, state, reached))
            reached.update(x.name for x in op.outputs)
            for extra, spec in _adapter(op, rank, weight, size, upstream=upstream):
                operators.append(extra)
                added[spec.name] = spec
                own.append(spec.name)
        key = (segment.equals, tuple((op.backward_flops, op.saved_bytes, op.target) for op in operators))
        segments.append(
            replace(
                segment,
                operators=tuple(operators),
                parameters=tuple(dict.fromkeys(own)),
                equals=seen.setdefault(key, segment.index),
            )
        )
    if not added:
        raise RequestError(f"--trainable lora: {graph.name} has no matmul with a matrix to adapt", hint=_HINT)
    return replace(graph, parameters=(*frozen, *added.values()), segments=tuple(segments))


def _adapted(op: Operator, specs: Mapping[str, ParameterSpec]) -> ParameterSpec | None:
    """The matrix that gets an adapter; None where `op` is no matmul with a plain matrix."""
    if op.kind != "matmul" or op.gemm is None or "grouped_mm" in op.target or not op.inputs or not op.outputs:
        return None
    return next((specs[n] for n in op.parameters if n in specs and len(specs[n].shape) == 2), None)


def _adapter(
    op: Operator, rank: int, weight: ParameterSpec, size: int, *, upstream: bool
) -> list[tuple[Operator, ParameterSpec]]:
    """The two thin matmuls beside `op`."""
    assert op.gemm is not None, "only matmuls with known sizes are adapted"
    _, rows, columns, depth = op.gemm
    source, out = op.inputs[0], op.outputs[0]
    dtype = weight.dtype
    thin = TensorSpec(name=f"{op.name}.lora", shape=(*source.shape[:-1], rank), dtype=out.dtype)
    down = ParameterSpec(name=f"{weight.name}.lora_down", shape=(rank, depth), dtype=dtype)
    up = ParameterSpec(name=f"{weight.name}.lora_up", shape=(columns, rank), dtype=dtype)
    wide = TensorSpec(name=f"{op.name}.lora_out", shape=out.shape, dtype=out.dtype)

    def matmul(
        name: str, x: TensorSpec, y: TensorSpec, spec: ParameterSpec, n: int, k: int, halves: int, kept: int
    ) -> Operator:
        flops = 2.0 * rows * n * k
        return Operator(
            name=name, target="aten.linear.default", kind="matmul", module=op.module, inputs=(x,), outputs=(y,),
            parameters=(spec.name,), flops=flops, backward_flops=halves * flops,
            read_bytes=x.nbytes + spec.numel * size, write_bytes=y.nbytes, saved_bytes=kept, gemm=(1, rows, n, k),
        )  # fmt: skip

    # The layer's input was kept for the frozen weight's gradient and now is for the adapter's.
    first = matmul(f"{op.name}.lora_down", source, thin, down, rank, depth, 2 if upstream else 1, op.saved_bytes)
    second = matmul(f"{op.name}.lora_up", thin, wide, up, columns, rank, 2, thin.nbytes)
    return [(first, down), (second, up)]
