"""LSTM, GRU and RNN: ONNX keeps each gate's weights in another order than torch, and both biases apart."""

from __future__ import annotations

from typing import Any

import torch

from plait.capture.onnx.ops.steps import Steps
from plait.capture.onnx.ops.table import operator
from plait.capture.onnx.values import Call, Value

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
    plain = _is_plain(call, lengths, tensor.shape[1 if call.attribute("layout", 0) else 0], states)
    directions, hidden = recurrent.shape[0], recurrent.shape[-1]
    batch_first = bool(call.attribute("layout", 0))
    if batch_first:
        tensor = tensor.transpose(0, 1)
    backwards = call.attribute("direction", "forward") == "reverse"
    if backwards and plain:
        tensor = tensor.flip(0)
    biases = call.tensor(b) if b is not None else tensor.new_zeros(directions, 2 * weights.shape[1])
    starts = []
    for index in range(2 if kind == "LSTM" else 1):
        given = states[index] if index < len(states) else None
        zero = tensor.new_zeros(directions, tensor.shape[1], hidden)
        start = zero if given is None else call.tensor(given)
        starts.append(start.transpose(0, 1) if batch_first and given is not None else start)
    if not plain:
        peepholes = states[2] if kind == "LSTM" and len(states) > 2 else None
        run = Steps(call, tensor, (weights, recurrent, biases), starts, lengths, peepholes)
        y, ends = run.outputs()
        if batch_first:
            y, ends = y.permute(2, 0, 1, 3), [end.transpose(0, 1) for end in ends]
        return (y, *ends)
    flat = [
        _gates(part[d], _ORDER[kind], hidden)
        for d in range(directions)
        for part in (weights, recurrent, biases[:, : weights.shape[1]], biases[:, weights.shape[1] :])
    ]
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


def _is_plain(call: Call, lengths: Value, steps: Any, states: tuple[Value, ...]) -> bool:
    """Whether torch's own kernel computes it."""
    names = [name.decode() if isinstance(name, bytes) else name for name in call.attribute("activations", [])]
    plain = _PLAIN[call.node.op]
    if names and names not in (plain, plain * 2):
        return False
    if call.attribute("clip") or call.attribute("input_forget", 0) or (len(states) > 2 and states[2] is not None):
        return False
    if call.node.op == "GRU" and not call.attribute("linear_before_reset", 0):
        return False
    return lengths is None or (
        not isinstance(lengths, torch.Tensor) and not any(bool(length != steps) for length in lengths.flat)
    )
