"""How much work a captured operator is: kind, FLOP, bytes."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import fx

from plait.capture.prelude import is_mutating
from plait.capture.program import Program
from plait.schema import Graph, Operator, ParameterSpec, Segment, TensorSpec

__all__ = ["Flops", "build_graph", "flops_of", "kind_of", "module_path"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Flops:
    """Multiply and add count as two."""

    forward: float = 0.0
    backward: float = 0.0
    gemm: tuple[int, int, int, int] | None = None
    """(batch, m, n, k)."""


_KINDS: dict[str, str] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "_grouped_mm", "grouped_mm_fallback", "mv",
                     "dot"), "matmul"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"), "conv"),
    "scaled_dot_product_attention": "attention",
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "_fused_rms_norm"), "norm"),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_safe_softmax"), "softmax"),
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd", "mse_loss", "binary_cross_entropy_with_logits",
                     "smooth_l1_loss", "l1_loss", "kl_div", "ctc_loss"), "loss"),
    **dict.fromkeys(("embedding", "embedding_bag"), "embedding"),
    **dict.fromkeys(("sum", "mean", "max", "min", "amax", "amin", "var", "norm", "linalg_vector_norm", "cumsum",
                     "argmax", "topk", "sort", "argsort", "logsumexp", "prod", "all", "any"), "reduction"),
    **dict.fromkeys(("scatter", "index_put", "index_put_", "index_add", "index_add_", "scatter_add", "gather", "index",
                     "index_select", "masked_scatter"), "scatter"),
}  # fmt: skip

_VIEWS = ("view", "reshape", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "chunk",
          "split", "split_with_sizes", "unbind", "flatten", "unflatten", "narrow", "detach", "alias", "view_as",
          "expand_as", "movedim", "sym_size", "lift_fresh_copy", "unfold", "as_strided", "contiguous")  # fmt: skip


def module_path(node: fx.Node) -> tuple[str, ...]:
    """The user's module path of a node, as a tuple of names; empty for the loss and for top-level code."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ()
    path = str(list(stack.values())[-1][0])
    parts = tuple(part for part in path.split(".") if part)
    return parts[1:] if parts[:1] == ("model",) else ()


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))


def kind_of(node: fx.Node) -> str:
    """One of the kinds of `schema.Operator`."""
    name = _name(node)
    if name in _KINDS:
        return _KINDS[name]
    if name in _VIEWS or node.target is operator.getitem:
        return "view"
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return "random"
    return "elementwise" if torch.Tag.pointwise in tags else "other"


def _spec(value: object) -> TensorSpec | None:
    specs = value.meta.get("specs", ()) if isinstance(value, fx.Node) else ()
    return specs[0] if specs else None


def _shape(value: object) -> Shape:
    spec = _spec(value)
    return spec.shape if spec else ()


def flops_of(node: fx.Node) -> Flops:
    """FLOP of matrix multiplies, convolutions and attention; other operators are bound by bytes and count none.

    Attention counts in full, no causal discount. Each of a multiply's two inputs that needs a gradient costs another
    multiply of the same size in the backward; attention's backward is two and a half (five products against two).
    """
    kind = kind_of(node)
    if kind == "attention":
        return _attention(node)
    if kind == "matmul":
        gemm = _gemm(node)
        return _with_backward(node, gemm) if gemm else Flops()
    if kind == "conv":
        gemm = _conv(node)
        return _with_backward(node, gemm) if gemm else Flops()
    return Flops()


def _with_backward(node: fx.Node, gemm: tuple[int, int, int, int]) -> Flops:
    forward = 2.0 * math.prod(gemm)
    operands = [a for a in node.all_input_nodes if a.meta.get("specs") and len(_shape(a)) >= 2]
    needing = sum(bool(a.meta.get("requires_grad")) for a in operands[:2])
    return Flops(forward, needing * forward, gemm)


def _attention(node: fx.Node) -> Flops:
    query, key, value = (_shape(arg) for arg in node.args[:3])
    if len(query) < 3:
        return Flops()
    heads = math.prod(query[:-2])
    rows, columns, width, value_width = query[-2], key[-2], query[-1], value[-1]
    forward = 2.0 * heads * rows * columns * (width + value_width)
    needs = bool(node.meta.get("requires_grad"))
    return Flops(forward, 2.5 * forward if needs else 0.0, (heads, rows, columns, width))


def _gemm(node: fx.Node) -> tuple[int, int, int, int] | None:
    name, args, out = _name(node), node.args, _shape(node)
    if name == "linear":
        weight = _shape(args[1])
        rows = math.prod(_shape(args[0])[:-1])
        return (1, rows, weight[0] if len(weight) > 1 else 1, weight[-1])
    if name in ("addmm", "baddbmm"):
        args = args[1:]
    if name == "einsum":
        operands = args[1] if isinstance(args[1], list | tuple) else ()
        sizes = math.prod(math.prod(_shape(o)) for o in operands)
        # In a product of two, every index is in two of the three tensors (batch indices in three).
        depth = math.sqrt(sizes / max(1, math.prod(out))) if len(operands) == 2 else 1.0
        return (1, math.prod(out), 1, max(1, round(depth)))
    if name in ("_grouped_mm", "grouped_mm_fallback"):  # torch's own, and what transformers runs on a CPU
        tokens, experts = _shape(args[0]), _shape(args[1])
        if len(tokens) == 2 and len(experts) == 3:  # every row meets one expert
            return (1, tokens[0], experts[-1], experts[-2])
        return (1, math.prod(out[:-1]), out[-1], tokens[-1])
    left, right = _shape(args[0]), _shape(args[1])
    if not left or not right:
        return None
    if len(right) == 1:
        return (1, math.prod(left[:-1]), 1, left[-1])
    if len(left) == 1:
        return (1, 1, math.prod(out), left[-1])
    if len(right) == 2:
        return (1, math.prod(left[:-1]), right[-1], left[-1])
    return (math.prod(out[:-2]), left[-2], right[-1], left[-1])


def _conv(node: fx.Node) -> tuple[int, int, int, int] | None:
    source, weight, out = _shape(node.args[0]), _shape(node.args[1]), _shape(node)
    if not weight or not out:
        return None
    if "transpose" in _name(node):
        return (1, math.prod(source) // source[-len(weight) + 1], math.prod(weight[1:]), weight[0])
    channels = weight[0]
    return (1, math.prod(out) // channels, channels, math.prod(weight[1:]))


def build_graph(program: Program) -> Graph:
    """The torch-free record of a program whose nodes are measured and carry their segment."""
    nodes = [n for n in program.module.graph.nodes if n.op == "call_function" and n.meta.get("specs")]
    count = 1 + max((n.meta["segment"] for n in nodes), default=0)
    rows: list[list[fx.Node]] = [[] for _ in range(count)]
    for node in nodes:
        rows[max(node.meta["segment"], 0)].append(node)
    live = _live_between(program, count)
    parameters = _parameter_specs(program)
    segments: list[Segment] = []
    seen: dict[object, int] = {}
    for index, row in enumerate(rows):
        operators = tuple(_operator(program, node) for node in row)
        names = tuple(dict.fromkeys(name for op in operators for name in op.parameters))
        key = _structure(operators, [parameters[n] for n in names], live[index], live[index + 1])
        equals = seen.setdefault(key, index)
        segments.append(
            Segment(
                index=index,
                name=_common_name(row),
                operators=operators,
                parameters=names,
                live_in=live[index],
                live_out=live[index + 1],
                equals=equals,
            )
        )
    inputs = [n.meta["specs"][0] for n in program.module.graph.nodes if _is_input(program, n)]
    return Graph(
        name=program.job.name or "model",
        batch=program.batch,
        tokens_per_sample=_tokens(inputs),
        inputs=tuple(inputs),
        parameters=tuple(parameters.values()),
        buffers=tuple(_buffer_specs(program)),
        segments=tuple(segments),
    )


def _is_input(program: Program, node: fx.Node) -> bool:
    if node.op != "placeholder" or not node.meta.get("specs"):
        return False
    return program.placeholders[node.name].kind == "input"


def _tokens(inputs: list[TensorSpec]) -> int:
    """Positions per sample: the second size of the first integer input of two dimensions, else 1."""
    for spec in inputs:
        if spec.dtype in ("int64", "int32") and len(spec.shape) == 2:
            return spec.shape[1]
    return 1


def _live_between(program: Program, count: int) -> list[tuple[TensorSpec, ...]]:
    """For each border 0..count, the tensors that cross it."""
    last: dict[fx.Node, int] = {}
    made: dict[fx.Node, int] = {}
    for node in program.module.graph.nodes:
        here = node.meta.get("segment", -1)
        if node.op == "output":
            here = count - 1
        for parent in node.all_input_nodes:
            if parent.meta.get("segment", -1) >= 0 and here >= 0:
                last[parent] = max(last.get(parent, 0), here)
        made[node] = here
    borders: list[list[TensorSpec]] = [[] for _ in range(count + 1)]
    for node, stop in last.items():
        for border in range(made[node] + 1, stop + 1):
            borders[border].extend(node.meta["specs"])
    return [tuple(border) for border in borders]


def _operator(program: Program, node: fx.Node) -> Operator:
    flops = flops_of(node)
    inputs = [spec for parent in node.all_input_nodes for spec in parent.meta.get("specs", ())]
    outputs = node.meta["specs"]
    kind = kind_of(node)
    view = kind == "view"
    parameters = [
        program.placeholders[parent.name].name
        for parent in map(_behind_views, node.all_input_nodes)
        if parent.op == "placeholder" and program.placeholders[parent.name].kind == "parameter"
    ]
    read = sum(spec.nbytes for spec in inputs)
    if kind == "embedding" and len(inputs) == 2:  # a lookup reads the rows it gives back, not the table
        read = outputs[0].nbytes + min(spec.nbytes for spec in inputs)
    return Operator(
        name=node.name,
        target=str(node.target),
        kind=kind,
        module=".".join(module_path(node)),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        parameters=tuple(dict.fromkeys(parameters)),
        flops=flops.forward,
        backward_flops=flops.backward,
        read_bytes=0 if view else read,
        write_bytes=0 if view or is_mutating(node) else sum(spec.nbytes for spec in outputs),
        saved_bytes=node.meta["saved_bytes"],
        gemm=flops.gemm,
    )


def _behind_views(node: fx.Node) -> fx.Node:
    """The tensor that `node` is a view of: a weight that comes transposed is that weight."""
    while node.op == "call_function" and kind_of(node) == "view" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _structure(
    operators: tuple[Operator, ...],
    parameters: list[ParameterSpec],
    live_in: tuple[TensorSpec, ...],
    live_out: tuple[TensorSpec, ...],
) -> object:
    """Equal for segments that do the same work on the same shapes."""
    return (
        tuple(
            (op.target, tuple((t.shape, t.dtype) for t in (*op.inputs, *op.outputs)), op.saved_bytes, op.backward_flops)
            for op in operators
        ),
        tuple((p.shape, p.dtype, p.trainable) for p in parameters),
        tuple((t.shape, t.dtype) for t in live_in),
        tuple((t.shape, t.dtype) for t in live_out),
    )


def _common_name(row: list[fx.Node]) -> str:
    """The module path that covers the most of a segment's nodes at the depth where they part."""
    paths = [module_path(node) for node in row if module_path(node)]
    if not paths:
        in_model = any(
            str(path).startswith("model") for n in row for path, _ in (n.meta.get("nn_module_stack") or {}).values()
        )
        return "model" if in_model else "loss"
    common = paths[0]
    for path in paths[1:]:
        depth = 0
        while depth < min(len(common), len(path)) and common[depth] == path[depth]:
            depth += 1
        common = common[:depth]
    if common:
        return ".".join(common)
    heads = [path[0] for path in paths]
    return max(set(heads), key=heads.count)


def _parameter_specs(program: Program) -> dict[str, ParameterSpec]:
    others: dict[str, list[str]] = {}
    for alias, first in program.aliases.items():
        others.setdefault(first, []).append(alias)
    found = {}
    for node in program.module.graph.nodes:
        if node.op == "placeholder" and program.placeholders[node.name].kind == "parameter":
            spec, place = node.meta["specs"][0], program.placeholders[node.name]
            found[place.name] = ParameterSpec(
                name=place.name,
                shape=spec.shape,
                dtype=spec.dtype,
                trainable=place.trainable,
                aliases=tuple(others.get(place.name, ())),
            )
    return found


def _buffer_specs(program: Program) -> list[ParameterSpec]:
    return [
        ParameterSpec(
            name=program.placeholders[node.name].name,
            shape=node.meta["specs"][0].shape,
            dtype=node.meta["specs"][0].dtype,
            trainable=False,
        )
        for node in program.module.graph.nodes
        if node.op == "placeholder" and program.placeholders[node.name].kind == "buffer"
    ]
