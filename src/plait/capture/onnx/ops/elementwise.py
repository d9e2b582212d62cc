"""Operators element by element: arithmetic, comparisons, activations, casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from plait.capture.onnx.ops.table import OPERATORS, Operator, operator
from plait.capture.onnx.values import DTYPES, Array, Call, Value, dtype_of, is_static

__all__: list[str] = []

_Tensor = torch.Tensor

for _name, _function in {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,  # half to even, as ONNX has it
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}.items():
    OPERATORS["", _name] = Operator(lambda _call, x, _f=_function: _f(x), raw=False)


def _operands(call: Call, a: Value, b: Value) -> tuple[Any, Any]:
    """Both, a constant of one element as a Python number where it decides neither shape nor type."""
    assert a is not None
    assert b is not None
    if isinstance(a, torch.Tensor):
        return a, _number(call, b, a)
    if isinstance(b, torch.Tensor):
        return _number(call, a, b), b
    return call.tensor(a), call.tensor(b)


def _number(call: Call, value: torch.Tensor | Array, other: torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor):
        return value
    if value.size == 1 and value.ndim <= other.dim() and dtype_of(value) == other.dtype and is_static(value):
        return value.reshape(()).item()
    return call.tensor(value)


def _binary(*names: str) -> Callable[[Callable[[Any, Any], _Tensor]], Callable[[Any, Any], _Tensor]]:
    def enter(function: Callable[[Any, Any], _Tensor]) -> Callable[[Any, Any], _Tensor]:
        for name in names:
            OPERATORS["", name] = Operator(lambda call, a, b: function(*_operands(call, a, b)), raw=True)
        return function

    return enter


_binary("Add")(lambda a, b: a + b)
_binary("Sub")(lambda a, b: a - b)
_binary("Mul")(lambda a, b: a * b)
_binary("Equal")(lambda a, b: a == b)
_binary("Less")(lambda a, b: a < b)
_binary("LessOrEqual")(lambda a, b: a <= b)
_binary("Greater")(lambda a, b: a > b)
_binary("GreaterOrEqual")(lambda a, b: a >= b)
_binary("And", "BitwiseAnd")(lambda a, b: a & b)
_binary("Or", "BitwiseOr")(lambda a, b: a | b)
_binary("Xor", "BitwiseXor")(lambda a, b: a ^ b)


@_binary("Div")
def _div(a: Any, b: Any) -> _Tensor:
    """Whole numbers are divided towards zero."""
    whole = not (a if isinstance(a, _Tensor) else b).dtype.is_floating_point
    return torch.div(a, b, rounding_mode="trunc" if whole else None)


@_binary("Pow")
def _pow(a: Any, b: Any) -> _Tensor:
    """In the type of the base."""
    power: _Tensor = a**b
    return power.to(a.dtype) if isinstance(a, _Tensor) else power


@operator("Mod")
def _mod(call: Call, a: _Tensor, b: _Tensor) -> _Tensor:
    return torch.fmod(a, b) if call.attribute("fmod", 0) else torch.remainder(a, b)


@operator("BitShift")
def _bit_shift(call: Call, a: _Tensor, b: _Tensor) -> _Tensor:
    return a << b if call.attribute("direction") == "LEFT" else a >> b


@operator("PRelu")
def _prelu(_call: Call, x: _Tensor, slope: _Tensor) -> _Tensor:
    return torch.where(x < 0, x * slope, x)


@operator("Max", "Min", "Sum", "Mean")
def _variadic(call: Call, *values: _Tensor) -> _Tensor:
    pair = {"Max": torch.maximum, "Min": torch.minimum}.get(call.node.op, torch.add)
    total = values[0]
    for value in values[1:]:
        total = pair(total, value)
    return total / len(values) if call.node.op == "Mean" else total


@operator("Where", raw=True)
def _where(call: Call, condition: Value, a: Value, b: Value) -> _Tensor:
    assert condition is not None
    left, right = _operands(call, a, b)
    return torch.where(call.tensor(condition), left, right)


@operator("Clip", raw=True)
def _clip(call: Call, x: Value, low: Value = None, high: Value = None) -> _Tensor:
    assert x is not None
    bounds = []
    for value, name in ((low, "min"), (high, "max")):
        given = value.reshape(()).item() if isinstance(value, np.ndarray) else value
        bounds.append(call.attribute(name) if given is None else given)
    tensor = call.tensor(x)
    if bounds == [None, None]:
        return tensor
    if any(isinstance(bound, _Tensor) for bound in bounds):
        for bound, pick in zip(bounds, (torch.maximum, torch.minimum), strict=True):
            if bound is not None:
                other = bound if isinstance(bound, _Tensor) else torch.full((), bound, dtype=tensor.dtype)
                tensor = pick(tensor, other.to(tensor))
        return tensor
    return torch.clamp(tensor, bounds[0], bounds[1])


@operator("Cast", raw=True)
def _cast(call: Call, x: Value) -> _Tensor:
    assert x is not None
    to = DTYPES.get(call.attribute("to"))
    if to is None:
        raise call.refuse(f"a cast to type {call.attribute('to')} (text, or fewer than 16 bits)")
    return call.tensor(x).to(to)


@operator("CastLike")
def _cast_like(_call: Call, x: _Tensor, like: _Tensor) -> _Tensor:
    return x.to(like.dtype)


@operator("Identity", raw=True)
def _identity(_call: Call, x: Value) -> Value:
    return x


@operator("IsInf")
def _is_inf(call: Call, x: _Tensor) -> _Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if call.attribute("detect_positive", 1):
        found = found | (x == math.inf)
    if call.attribute("detect_negative", 1):
        found = found | (x == -math.inf)
    return found


@operator("LeakyRelu")
def _leaky_relu(call: Call, x: _Tensor) -> _Tensor:
    return F.leaky_relu(x, call.attribute("alpha", 0.01))


@operator("Elu")
def _elu(call: Call, x: _Tensor) -> _Tensor:
    return F.elu(x, call.attribute("alpha", 1.0))


@operator("Celu")
def _celu(call: Call, x: _Tensor) -> _Tensor:
    return F.celu(x, call.attribute("alpha", 1.0))


@operator("Selu")
def _selu(call: Call, x: _Tensor) -> _Tensor:
    alpha = call.attribute("alpha", 1.6732632423543772)
    gamma = call.attribute("gamma", 1.0507009873554805)
    bent: _Tensor = torch.clamp(x, min=0) + alpha * (torch.exp(torch.clamp(x, max=0)) - 1)
    return bent * float(gamma)


@operator("ThresholdedRelu")
def _thresholded_relu(call: Call, x: _Tensor) -> _Tensor:
    return torch.where(x > call.attribute("alpha", 1.0), x, 0.0)


@operator("HardSigmoid")
def _hard_sigmoid(call: Call, x: _Tensor) -> _Tensor:
    return torch.clamp(call.attribute("alpha", 0.2) * x + call.attribute("beta", 0.5), 0, 1)


@operator("Shrink")
def _shrink(call: Call, x: _Tensor) -> _Tensor:
    bias, edge = call.attribute("bias", 0.0), call.attribute("lambd", 0.5)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, 0.0))


@operator("Gelu")
@operator("Gelu", domain="com.microsoft")
def _gelu(call: Call, x: _Tensor) -> _Tensor:
    return F.gelu(x, approximate=call.attribute("approximate", "none"))


@operator("Swish")
def _swish(call: Call, x: _Tensor) -> _Tensor:
    return x * torch.sigmoid(call.attribute("alpha", 1.0) * x)


@operator("Dropout", raw=True)
def _dropout(call: Call, x: Value, ratio: Value = None, _mode: Value = None) -> tuple[Value, ...]:
    """While the module trains, whatever the file's own training mode says: it was written for inference."""
    assert x is not None
    share = call.floats(ratio, "ratio")[0] if ratio is not None else call.attribute("ratio", 0.5)
    tensor = call.tensor(x)
    if not call.training or not share:
        return x, torch.ones_like(tensor, dtype=torch.bool)
    if len(call.node.outputs) > 1 and call.node.outputs[1]:
        mask = torch.rand_like(tensor) >= share
        return tensor * mask / (1 - share), mask
    return (F.dropout(tensor, share, training=True),)
