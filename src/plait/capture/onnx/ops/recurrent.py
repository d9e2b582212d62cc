"""LSTM, GRU and RNN: ONNX keeps each gate's weights in another order than torch, and both biases apart."""

from __future__ import annotations

from typing import Any

import torch

from plait.capture.onnx.ops.table import operator
from plait.capture.onnx.values import Array, Call, Value

__all__: list[str] = []

_Tensor = torch.Tensor
_PLAIN = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
# Where each of torch's gates stands among ONNX's: LSTM has iofc against ifgo, GRU zrh against rzn.
_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}


@operator("LSTM", "GRU", "RNN", raw=True)
def _recurrent(
    call: Call, x: Value, w: Value, r: Value, b: Value = None, lengths: Value = None, *states: Value
) -> tuple[_Tensor, ...]:
    """Y: [time, directions, batch, hidden], last hidden (and cell) state: [directions, batch, hidden]."""
    kind = call.node.op
    assert x is not None
    assert w is not None
    assert r is not None
    tensor, weights, recurrent = call.tensor(x), call.tensor(w), call.tensor(r)
    _check(call, lengths, tensor.shape[1 if call.attribute("layout", 0) else 0], states)
    directions, hidden = recurrent.shape[0], recurrent.shape[-1]
    batch_first = bool(call.attribute("layout", 0))
    if batch_first:
        tensor = tensor.transpose(0, 1)
    backwards = call.attribute("direction", "forward") == "reverse"
    if backwards:
        tensor = tensor.flip(0)
    biases = call.tensor(b) if b is not None else tensor.new_zeros(directions, 2 * weights.shape[1])
    starts = []
    for index in range(2 if kind == "LSTM" else 1):
        given = states[index] if index < len(states) else None
        zero = tensor.new_zeros(directions, tensor.shape[1], hidden)
        start = zero if given is None else call.tensor(given)
        starts.append(start.transpose(0, 1) if batch_first and given is not None else start)
    flat = [
        _gates(part[d], _ORDER[kind], hidden)
        for d in range(directions)
        for part in (weights, recurrent, biases[:, : weights.shape[1]], biases[:, weights.shape[1] :])
    ]
    if kind == "GRU" and not call.attribute("linear_before_reset", 0):
        if directions == 2:
            raise call.refuse("two directions with linear_before_reset=0")
        y, last = _gru_reset_first(tensor, flat, starts[0])
        ends = [last]
    else:
        function: Any = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN": torch.rnn_tanh}[kind]
        state = starts if kind == "LSTM" else starts[0]
        y, *ends = function(tensor, state, flat, True, 1, 0.0, False, directions == 2, False)
    if backwards:
        y = y.flip(0)
    y = y.reshape(*y.shape[:2], directions, hidden).transpose(1, 2)
    if batch_first:
        y, ends = y.permute(2, 0, 1, 3), [end.transpose(0, 1) for end in ends]
    return (y, *ends)


def _gates(part: _Tensor, order: tuple[int, ...], hidden: int) -> _Tensor:
    blocks: Any = torch.split(part, hidden, 0)
    return torch.cat([blocks[index] for index in order], 0) if len(order) > 1 else part


def _check(call: Call, lengths: Value, steps: Any, states: tuple[Value, ...]) -> None:
    functions = list(call.attribute("activations", []))
    names = [name.decode() if isinstance(name, bytes) else name for name in functions]
    plain = _PLAIN[call.node.op]
    if names and names not in (plain, plain * 2):
        raise call.refuse(f"activations {names}")
    if call.attribute("clip") or call.attribute("input_forget", 0):
        raise call.refuse("clip or input_forget")
    if len(states) > 2 and states[2] is not None:
        raise call.refuse("peepholes")
    if lengths is not None:
        if isinstance(lengths, torch.Tensor):
            raise call.refuse("sequence lengths that depend on the values of the data")
        if any(bool(length != steps) for length in _flat(lengths)):
            raise call.refuse("sequence lengths that differ from the number of time steps")


def _flat(array: Array) -> list[Any]:
    return list(array.flat)


def _gru_reset_first(x: _Tensor, flat: list[_Tensor], start: _Tensor) -> tuple[_Tensor, _Tensor]:
    """The form of the GRU in which the reset gate multiplies the state before the product (torch has the other one)."""
    w, r, wb, rb = flat
    hidden = r.shape[-1]
    state, outputs = start[0], []
    for step in x.unbind(0):
        given = torch.nn.functional.linear(step, w, wb + rb)
        gates = torch.sigmoid(given[:, : 2 * hidden] + torch.nn.functional.linear(state, r[: 2 * hidden]))
        reset, update = gates.chunk(2, -1)
        new = torch.tanh(given[:, 2 * hidden :] + torch.nn.functional.linear(reset * state, r[2 * hidden :]))
        state = (1 - update) * new + update * state
        outputs.append(state)
    return torch.stack(outputs), state.unsqueeze(0)
