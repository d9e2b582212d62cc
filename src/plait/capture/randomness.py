"""Values that steer Python while a model is captured: scalar random numbers, and assertions on data."""

from __future__ import annotations

import linecache
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from plait.errors import CaptureError

__all__ = ["fixed_python_randomness", "refused_outside_torch"]


@dataclass
class _Seen:
    seen: bool = False


class _Fixed(TorchFunctionMode):
    """`torch.rand([])` gives a plain number, as layer drop compares it in Python, which export cannot follow."""

    def __init__(self, value: float, record: _Seen) -> None:
        super().__init__()
        self._value = value
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.rand and args and isinstance(args[0], list | tuple | torch.Size) and len(args[0]) == 0:
            self._record.seen = True
            return self._value
        if func in _READS and _in_assertion():
            return True
        return func(*args, **(kwargs or {}))


_READS = (torch.Tensor.__bool__, torch.Tensor.item)


def _in_assertion() -> bool:
    """Whether the user's code is in an `assert`: it says what holds anyway, and no graph can hold the question."""
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("assert ")


@contextmanager
def fixed_python_randomness(*, high: bool = False) -> Iterator[_Seen]:
    """Scalar `torch.rand([])` is 0 (or just below 1); says in `.seen` whether one was drawn."""
    record = _Seen()
    with _Fixed(1 - 1e-7 if high else 0.0, record):
        yield record


@contextmanager
def refused_outside_torch() -> Iterator[None]:
    """Python's and numpy's generators may not be drawn from: a graph would hold that one draw for ever.

    Raises:
        CaptureError: they were.
    """
    before = _states()
    yield
    if _states() != before:
        raise CaptureError(
            "capture: the forward draws from Python's or numpy's random generator, which a graph cannot repeat",
            hint="draw with torch (torch.rand), switch the masking or layer drop off, or run under dp or fsdp only",
        )


def _states() -> list[Any]:
    states: list[Any] = [random.getstate()]
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        states += [name, keys.tobytes(), rest]
    return states
