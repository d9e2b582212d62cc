"""State that is no large tensor, as JSON: step counts, generator states, param_groups, scheduler state.

What JSON has itself stays as it is. Tuples, dicts with keys that are no strings, bytes, tensors and arrays become
`{"$tuple": [...]}`, `{"$dict": [[key, value], ...]}`, `{"$bytes": base64}`, `{"$tensor": [dtype, shape, base64]}` and
`{"$array": [dtype, shape, base64]}`. Reading builds plain values only; nothing in a file can run code.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch

from plait.errors import CheckpointError, PlaitError

__all__ = ["from_plain", "to_plain"]


def to_plain(value: Any, where: str = "state") -> Any:
    """The value as `json.dumps` takes it; an equal one comes back from `from_plain` (subclasses of dict as dict).

    Raises:
        PlaitError: something in it is none of the kinds above, such as a function; `where` names it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        # Also numpy's and torch's own subclasses of these, which JSON would write as they are.
        return value
    if isinstance(value, list):
        return [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: to_plain(item, f"{where}.{key}") for key, item in value.items()}
        return {"$dict": [[to_plain(k, where), to_plain(v, f"{where}[{k!r}]")] for k, v in value.items()]}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {
            "$tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), base64.b64encode(flat).decode()]
        }
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        array = np.ascontiguousarray(value)
        return {"$array": [array.dtype.str, list(np.shape(value)), base64.b64encode(array.tobytes()).decode()]}
    raise PlaitError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold",
        hint="keep numbers, text, lists, tuples, dicts and tensors in the state of schedulers and optimizers",
    )


def from_plain(value: Any) -> Any:
    """The value that `to_plain` wrote.

    Raises:
        CheckpointError: it is malformed.
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag, *others = value or ("",)
    if others or not tag.startswith("$"):
        return {key: from_plain(item) for key, item in value.items()}
    try:
        return _decoded(tag, value[tag])
    except (ValueError, TypeError, AttributeError, RuntimeError) as problem:
        raise CheckpointError(f"the checkpoint's state holds a malformed {tag}: {problem}") from None


def _decoded(tag: str, value: Any) -> Any:
    match tag:
        case "$tuple":
            return tuple(from_plain(item) for item in value)
        case "$dict":
            return {from_plain(key): from_plain(item) for key, item in value}
        case "$bytes":
            return base64.b64decode(value, validate=True)
        case "$tensor":
            name, shape, text = value
            dtype = getattr(torch, name)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} is no dtype")
            flat = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)) or bytearray(1), dtype=torch.uint8)
            return flat[: len(base64.b64decode(text))].clone().view(dtype).reshape(shape)
        case "$array":
            name, shape, text = value
            dtype = np.dtype(str(name))
            if dtype.kind not in "biufc":
                raise ValueError(f"{name} is no kind of number")
            return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype).reshape(shape).copy()
    raise ValueError("unknown tag")
