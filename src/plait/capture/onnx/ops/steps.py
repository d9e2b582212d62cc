"""LSTM, GRU and RNN step by step, where torch has no kernel: other activations, clipping, peepholes, sequences of unequal length,
and the GRU whose reset gate multiplies the state before the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from plait.capture.onnx.values import Call, Value

__all__ = ["Steps"]

_Tensor = torch.Tensor
_DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_PLAIN: dict[str, Callable[[_Tensor], _Tensor]] = {
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Relu": torch.relu,
    "Softsign": F.softsign,
    "Softplus": F.softplus,
}
_WITH_NUMBERS: dict[str, tuple[float, float, Callable[[_Tensor, float, float], _Tensor]]] = {
    "Affine": (1.0, 0.0, lambda x, a, b: a * x + b),
    "LeakyRelu": (0.01, 0.0, lambda x, a, _b: F.leaky_relu(x, a)),
    "ThresholdedRelu": (1.0, 0.0, lambda x, a, _b: torch.where(x > a, x, 0.0)),
    "ScaledTanh": (1.0, 1.0, lambda x, a, b: a * torch.tanh(b * x)),
    "HardSigmoid": (0.2, 0.5, lambda x, a, b: torch.clamp(a * x + b, 0, 1)),
    "Elu": (1.0, 0.0, lambda x, a, _b: F.elu(x, a)),
}
"""Name -> default alpha and beta, function."""


class Steps:
    """One node: x [time, batch, width]; weights, recurrent weights and biases [directions, ...]."""

    def __init__(
        self,
        call: Call,
        x: _Tensor,
        weights: tuple[_Tensor, _Tensor, _Tensor],
        starts: list[_Tensor],
        lengths: Value,
        peepholes: Value,
    ) -> None:
        self._call, self._x, self._weights, self._starts = call, x, weights, starts
        self._lengths = None if lengths is None else call.tensor(lengths)
        self._peepholes = None if peepholes is None else call.tensor(peepholes)
        self._kind = call.node.op
        self._hidden = weights[1].shape[-1]
        self._functions = self._activations()

    def outputs(self) -> tuple[_Tensor, list[_Tensor]]:
        """(y [time, directions, batch, hidden], last states [directions, batch, hidden])."""
        way = self._call.attribute("direction", "forward")
        ways = [False, True] if way == "bidirectional" else [way == "reverse"]
        done = [self._one(index, backwards=backwards) for index, backwards in enumerate(ways)]
        ends = [torch.stack([states[i] for _, states in done]) for i in range(len(self._starts))]
        return torch.stack([y for y, _ in done], 1), ends

    def _activations(self) -> list[Callable[[_Tensor], _Tensor]]:
        names = self._call.attribute("activations") or _DEFAULTS[self._kind] * self._weights[0].shape[0]
        alphas, betas = (list(self._call.attribute(f"activation_{which}", [])) for which in ("alpha", "beta"))
        found: list[Callable[[_Tensor], _Tensor]] = []
        for name in (name.decode() if isinstance(name, bytes) else name for name in names):
            if name in _PLAIN:
                found.append(_PLAIN[name])
                continue
            if name not in _WITH_NUMBERS:
                raise self._call.refuse(f"activation {name}")
            a, b, function = _WITH_NUMBERS[name]
            alpha, beta = alphas.pop(0) if alphas else a, betas.pop(0) if betas else b
            found.append(lambda x, f=function, a=alpha, b=beta: f(x, a, b))  # type: ignore[misc]
        return found

    def _one(self, way: int, *, backwards: bool) -> tuple[_Tensor, list[_Tensor]]:
        states = [start[way] for start in self._starts]
        count = self._x.shape[0]
        rows: list[Any] = [None] * count
        for step in range(count - 1, -1, -1) if backwards else range(count):
            new = self._step(way, self._x[step], states)
            if self._lengths is not None:  # what lies behind a sequence's end leaves its state alone
                inside = (step < self._lengths)[:, None]
                rows[step] = torch.where(inside, new[0], 0.0)
                states = [torch.where(inside, a, b) for a, b in zip(new, states, strict=True)]
            else:
                rows[step], states = new[0], new
        return torch.stack(rows), states

    def _step(self, way: int, x: _Tensor, states: list[_Tensor]) -> list[_Tensor]:
        weights, recurrent, biases = (part[way] for part in self._weights)
        first, second = biases.chunk(2)
        per_way = len(self._functions) // self._weights[0].shape[0]
        functions = self._functions[way * per_way : (way + 1) * per_way]
        given = F.linear(x, weights, first)
        if self._kind == "RNN":
            return [functions[0](self._clip(given + F.linear(states[0], recurrent, second)))]
        if self._kind == "GRU":
            return [self._gru(given, states[0], recurrent, second, functions)]
        return self._lstm(given + F.linear(states[0], recurrent, second), states[1], way, functions)

    def _clip(self, x: _Tensor) -> _Tensor:
        edge = self._call.attribute("clip")
        return x.clamp(-edge, edge) if edge else x

    def _gru(self, given: _Tensor, state: _Tensor, r: _Tensor, bias: _Tensor, functions: Any) -> _Tensor:
        size = self._hidden
        gates = given[:, : 2 * size] + F.linear(state, r[: 2 * size], bias[: 2 * size])
        update, reset = functions[0](self._clip(gates)).chunk(2, -1)
        if self._call.attribute("linear_before_reset", 0):
            own = reset * F.linear(state, r[2 * size :], bias[2 * size :])
        else:
            own = F.linear(reset * state, r[2 * size :], bias[2 * size :])
        new = functions[1](self._clip(given[:, 2 * size :] + own))
        out: _Tensor = (1 - update) * new + update * state
        return out

    def _lstm(self, gates: _Tensor, cell: _Tensor, way: int, functions: Any) -> list[_Tensor]:
        i, o, f, c = gates.chunk(4, -1)
        seen = None if self._peepholes is None else self._peepholes[way].chunk(3)
        if seen is not None:
            i, f = i + seen[0] * cell, f + seen[2] * cell
        i = functions[0](self._clip(i))
        f = 1 - i if self._call.attribute("input_forget", 0) else functions[0](self._clip(f))
        new = f * cell + i * functions[1](self._clip(c))
        if seen is not None:
            o = o + seen[1] * new
        return [functions[0](self._clip(o)) * functions[2](new), new]
