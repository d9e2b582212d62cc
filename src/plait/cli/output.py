"""One JSON object on stdout, or text for a person."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

__all__ = ["only_result_on_stdout", "plain_json", "show"]


@contextmanager
def only_result_on_stdout(is_json: bool) -> Iterator[None]:
    """Under --json, send what anybody prints meanwhile to stderr: the user's model, a library, a child process."""
    if not is_json:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 1)
        os.close(saved)


def show(result: Mapping[str, Any], is_json: bool, text: Callable[[Mapping[str, Any]], None]) -> None:
    """Print a result: as one JSON object, or by `text`."""
    if is_json:
        print(json.dumps(plain_json(result), allow_nan=False), flush=True)
    else:
        text(result)


def plain_json(value: Any) -> Any:
    """The value with what JSON cannot say made sayable: NaN and infinities are null, records are objects."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if hasattr(value, "to_dict"):
        return plain_json(value.to_dict())
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
