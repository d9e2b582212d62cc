"""The text of a TARGET, taken apart: `examples/gpt.py:job?layers=4&width=256`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from plait.errors import TargetError

__all__ = ["TargetText", "convert", "nearest"]


@dataclass(frozen=True, slots=True)
class TargetText:
    """What stands before the first `?`, and the arguments after it."""

    place: str
    arguments: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> TargetText:
        """Split at the first `?`, then at every `&`, then each part at its first `=`.

        Raises:
            TargetError: a part has no name or no `=`, or a name comes twice.
        """
        place, _, query = text.partition("?")
        if not place.strip():
            raise TargetError(
                f"target {text!r} is empty",
                hint="name a function that returns a plait.Job, such as examples/gpt.py:job, or hf:MODEL_TYPE",
            )
        arguments: dict[str, str] = {}
        for part in filter(None, query.split("&")):
            name, sign, value = part.partition("=")
            if not sign or not name:
                raise TargetError(f"target {text!r}: {part!r} after the ? is not name=value")
            if name in arguments:
                raise TargetError(f"target {text!r}: {name} is given twice")
            arguments[name] = value
        return cls(place, arguments)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", tuple: "a list"}
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def convert(text: str, kind: type[Any] | None, where: str) -> Any:
    """`text` as a `kind`: bool, int, float, str, list or tuple; with None, as whatever JSON value or number it looks like.

    Raises:
        TargetError: it is none; begins with `where`.
    """
    if kind is str:
        return text
    if kind is None:
        return _literal(text)
    try:
        if kind is bool:
            return bool(int(text)) if text in ("0", "1") else _WORDS[text.lower()]
        if kind is int:
            return _whole(text)
        if kind is float:
            return float(text)
        return kind(json.loads(text) if text.startswith("[") else [_literal(item) for item in text.split(",") if item])
    except (ValueError, KeyError):
        raise TargetError(f"{where}={text} is not {_KINDS[kind]}") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 1e6 is a whole number too
        if not number.is_integer():
            raise ValueError(text) from None
        return int(number)


def _literal(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float, json.loads):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def nearest(name: str, known: Iterable[str], count: int = 1) -> str:
    """`; did you mean 'width'?`, or nothing where no known name is close."""
    found = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
