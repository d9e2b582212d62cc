"""Control flow and sequences: branches and loops are run as Python runs them.

A branch whose condition is known (a constant, a size) is the one that is taken, and a loop of a known length is written out
round by round when the graph is captured. Where a condition depends on the values of the data, both branches are computed
and the right values picked; a loop of such a length runs, but no capture can follow it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from plait.capture.onnx.ops.table import operator
from plait.capture.onnx.values import Array, Call, Sequence, Value

__all__: list[str] = []

_MOST_ROUNDS = 1 << 16
_ON_DATA = "its condition depends on the values of the data"


@operator("If", raw=True)
def _if(call: Call, condition: Value) -> tuple[Any, ...]:
    truth = call.truth(condition)
    if truth is not None:
        return tuple(call.body("then_branch" if truth else "else_branch", []))
    assert isinstance(condition, torch.Tensor)
    pairs = zip(call.body("then_branch", []), call.body("else_branch", []), strict=True)
    return tuple(_either(call, condition.reshape(()), a, b) for a, b in pairs)


def _either(call: Call, condition: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    if isinstance(a, list) or isinstance(b, list) or tuple(a.shape) != tuple(b.shape):
        raise call.refuse(f"{_ON_DATA}, and its branches give values of different shapes")
    return torch.where(condition, call.tensor(a), call.tensor(b))


@operator("Loop", raw=True)
def _loop(call: Call, count: Value = None, condition: Value = None, *states: Any) -> tuple[Any, ...]:
    rounds = None if count is None else call.numbers(count, "number of rounds")[0]
    going = True if condition is None else call.truth(condition)
    carried, scanned = list(states), []
    index = 0
    while _goes_on(call, going) and (rounds is None or index < int(rounds)):
        if index == _MOST_ROUNDS:
            raise call.refuse(f"more than {_MOST_ROUNDS} rounds")
        still: Array = np.array(True)
        going, *results = call.body("body", [np.array(index, np.int64), still, *carried])
        going = call.truth(going)
        carried = results[: len(carried)]
        scanned.append(results[len(carried) :])
        index += 1
    wanted = len(call.node.outputs) - len(carried)
    if wanted and not scanned:
        raise call.refuse("no round at all, so that what it gathers has no shape")
    return (*carried, *(torch.stack([call.tensor(row[i]) for row in scanned]) for i in range(wanted)))


def _goes_on(call: Call, going: bool | None) -> bool:
    if going is None:
        raise call.refuse(_ON_DATA)
    return going


@operator("Scan", raw=True)
def _scan(call: Call, *values: Value) -> tuple[Any, ...]:
    inputs = call.attribute("num_scan_inputs")
    if call.opset < 9:
        raise call.refuse("the form of opset 8, which has a batch dimension")
    carried = list(values[: len(values) - inputs])
    given = [call.tensor(value) for value in values[len(values) - inputs :] if value is not None]
    axes = call.attribute("scan_input_axes") or [0] * inputs
    backwards = call.attribute("scan_input_directions") or [0] * inputs
    rounds = int(given[0].shape[axes[0]])
    if rounds > _MOST_ROUNDS or not rounds:
        raise call.refuse(f"{rounds} rounds")
    rows = []
    for index in range(rounds):
        parts = [
            x.select(a, rounds - 1 - index if back else index)
            for x, a, back in zip(given, axes, backwards, strict=True)
        ]
        results = call.body("body", [*carried, *parts])
        carried = results[: len(carried)]
        rows.append(results[len(carried) :])
    outputs = len(rows[0])
    places = call.attribute("scan_output_axes") or [0] * outputs
    turned = call.attribute("scan_output_directions") or [0] * outputs
    gathered = []
    for index in range(outputs):
        column = [call.tensor(row[index]) for row in rows]
        gathered.append(torch.stack(column[::-1] if turned[index] else column, places[index]))
    return (*carried, *gathered)


@operator("SequenceEmpty", raw=True)
def _empty(_call: Call) -> Sequence:
    return []


@operator("SequenceConstruct", raw=True)
def _construct(_call: Call, *values: torch.Tensor | Array) -> Sequence:
    return list(values)


@operator("SequenceInsert", raw=True)
def _insert(call: Call, sequence: Sequence, value: torch.Tensor | Array, place: Value = None) -> Sequence:
    index = len(sequence) if place is None else _index(call, sequence, place, past=1)
    return [*sequence[:index], value, *sequence[index:]]


@operator("SequenceErase", raw=True)
def _erase(call: Call, sequence: Sequence, place: Value = None) -> Sequence:
    index = len(sequence) - 1 if place is None else _index(call, sequence, place)
    return [*sequence[:index], *sequence[index + 1 :]]


@operator("SequenceAt", raw=True)
def _at(call: Call, sequence: Sequence, place: Value) -> torch.Tensor | Array:
    return sequence[_index(call, sequence, place)]


def _index(call: Call, sequence: Sequence, place: Value, past: int = 0) -> int:
    index = int(call.numbers(place, "place in the sequence")[0])
    size = len(sequence)
    if not -size <= index < size + past:
        raise IndexError(f"place {index} of a sequence of {size}")
    return index + size if index < 0 else index


@operator("SequenceLength", raw=True)
def _length(_call: Call, sequence: Sequence) -> Array:
    return np.array(len(sequence), np.int64)


@operator("ConcatFromSequence", raw=True)
def _concat_from(call: Call, sequence: Sequence) -> torch.Tensor:
    axis, parts = call.attribute("axis"), [call.tensor(value) for value in sequence]
    return torch.stack(parts, axis) if call.attribute("new_axis", 0) else torch.cat(parts, axis)


@operator("SplitToSequence", raw=True)
def _split_to(call: Call, x: Value, sizes: Value = None) -> Sequence:
    assert x is not None
    tensor, axis = call.tensor(x), call.attribute("axis", 0)
    if sizes is None:
        parts: Any = torch.split(tensor, 1, axis)
        return list(parts) if call.attribute("keepdims", 1) else [part.squeeze(axis) for part in parts]
    given = call.numbers(sizes, "split")
    is_one = (sizes.ndim if isinstance(sizes, np.ndarray) else sizes.dim()) == 0
    parts = torch.split(tensor, given[0] if is_one else given, axis)
    return list(parts)


@operator("Optional", raw=True)
def _optional(_call: Call, value: Any = None) -> Any:
    return value


@operator("OptionalHasElement", raw=True)
def _has_element(_call: Call, value: Any = None) -> Array:
    return np.array(value is not None)


@operator("OptionalGetElement", raw=True)
def _get_element(_call: Call, value: Any) -> Any:
    return value
