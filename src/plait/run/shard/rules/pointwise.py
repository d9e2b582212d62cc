"""Element-wise operators: all operands sharded alike, what is broadcast along the dim is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from plait.run.shard.local import forked_random
from plait.run.shard.operation import Op, Refusal, Step, shape_of
from plait.run.shard.placement import COPIED, PARTIAL, REPLICATED, Placement, Sharded
from plait.run.shard.rules.table import rule

__all__ = ["pointwise"]

aten: Any = torch.ops.aten


@rule(
    *("to", "_to_copy", "type_as", "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "detach_"),
    *("float", "masked_fill_", "fill_", "zero_", "hardtanh", "hardtanh_", "zeros_like", "ones_like", "full_like"),
    *("empty_like", "relu_", "feature_alpha_dropout", "where", "masked_fill", "clamp_", "nan_to_num", "copysign"),
    *("__and__", "__or__", "__xor__", "logical_not", "bitwise_not", "relu6", "relu6_", "selu", "celu", "prelu"),
    *("log_sigmoid", "rrelu", "softplus", "hardswish", "hardswish_", "silu_", "mish", "threshold", "threshold_"),
    *("square", "_assert_tensor_metadata", "sub_", "add_", "mul_", "div_", "pow_", "copy_", "exp_", "dequantize"),
    *("expand_as", "logaddexp", "float_power", "true_divide", "rsub", "special_expit", "isin", "view_as_real_"),
)
def pointwise(op: Op) -> Step | Refusal:
    """Element-wise operators, conversions and fills."""
    if op.has_partial():
        return linear_pointwise(op)
    split = op.split_operands()
    rank = len(op.shape)
    # The largest operand decides; ties go to the first.
    node, placement = max(split, key=lambda item: _numel(shape_of(item[0])))
    dim = placement.dim + rank - len(shape_of(node))
    if shape_of(node)[placement.dim] != op.shape[dim]:
        return Refusal("broadcast of a sharded dim", node)
    wanted: dict[fx.Node | None, Placement] = {}
    for operand in op.operands:
        own = dim - (rank - len(shape_of(operand)))
        broadcast = own < 0 or shape_of(operand)[own] == 1
        wanted[operand] = COPIED if broadcast else placement.moved(own)
    return op.step(placement.moved(dim), wanted)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


_LINEAR = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.to.dtype, aten.to.dtype_layout, aten.contiguous.default),
    *(aten.clone.default, aten.alias.default, aten.to.device, aten.to.other, aten.type_as.default, aten.add_.Tensor),
}
_SCALED = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}


def linear_pointwise(op: Op) -> Step | Refusal:
    """Parts of a sum pass through what is linear: sums of such parts, factors that are plain numbers."""
    target = op.node.target
    first = op.operands[0]
    if target in _LINEAR and all(op.at(n) is PARTIAL for n in op.operands):
        if len(op.operands) == 1 and len(op.node.all_input_nodes) == 1 and not _adds_number(op):
            return op.step(PARTIAL, {first: PARTIAL})
        if len(op.operands) == 2:
            return op.step(PARTIAL, dict.fromkeys(op.operands, PARTIAL))
    others = [n for n in op.operands[1:] if n is not first]
    if target in _SCALED and len(op.operands) == 2 and others and op.node.args[0] is first:
        second = others[0]
        if op.at(first) is PARTIAL and not isinstance(op.at(second), Sharded) and op.at(second) is not PARTIAL:
            return op.step(PARTIAL, {first: PARTIAL, second: COPIED})
        if target is aten.mul.Tensor and op.at(second) is PARTIAL and not isinstance(op.at(first), Sharded):
            return op.step(PARTIAL, {first: COPIED, second: PARTIAL})
    if target in _SCALED and len(op.operands) == 1 and op.at(first) is PARTIAL and is_number(op.args["other"]):
        return op.step(PARTIAL, {first: PARTIAL})
    return Refusal("not linear")


def is_number(value: object) -> bool:
    """Whether an argument is a plain number."""
    return isinstance(value, int | float)


def _adds_number(op: Op) -> bool:
    return "other" in op.args and not isinstance(op.args["other"], fx.Node)


@rule(
    "dropout", "dropout_", "feature_dropout", "native_dropout", "alpha_dropout", "bernoulli", "rand_like", "randn_like"
)
def random(op: Op) -> Step | Refusal:
    """Random element-wise operators: a stream of its own on each rank where the operand is sharded."""
    if op.has_partial():
        return Refusal("random on parts of a sum")
    split = op.split_operands()
    _, placement = split[0]
    if len(op.operands) > 1 or shape_of(op.operands[0])[: len(op.shape)] != op.shape:
        return Refusal("random operator of several operands")
    if is_idle(op):
        return op.step(placement, {op.operands[0]: placement})
    if op.node.target is not aten.dropout_.default and _is_inplace(op.node.target):
        return Refusal("random in place")
    target = aten.dropout.default if op.node.target is aten.dropout_.default else op.node.target
    return op.step(
        placement,
        {op.operands[0]: placement},
        target=forked_random,
        patch=lambda where: {"rank": where.rank},
        leading=(target,),
    )


def _is_inplace(target: Any) -> bool:
    return torch.Tag.inplace in getattr(target, "tags", ())


def is_idle(op: Op) -> bool:
    """Whether a dropout does nothing: switched off, or with probability 0."""
    probability = op.args.get("p", op.args.get("dropout_p"))
    return op.args.get("train", True) is False or probability == 0


@rule("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")
def creation(op: Op) -> Step | Refusal:
    """New tensors that take only dtype and device from their operand: whole, and the operand stays as it is."""
    source = op.operands[0]
    return op.step(REPLICATED, {source: op.at(source)}, rest=REPLICATED)
