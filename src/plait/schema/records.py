"""How every record reads and writes: frozen dataclasses to and from plain JSON or YAML values."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import types
import typing
from typing import Any, Self

__all__ = ["Record"]


class Record:
    """Mix-in for frozen dataclasses: `to_dict`, `from_dict`, `to_json`, `from_json`.

    Unknown keys, missing keys and values of the wrong kind raise ValueError with
    the path of the field, so that a hand-written file gets a useful message.
    """

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values only (dict, list, str, int, float, bool, None)."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """The record that `to_dict` wrote, checked.

        Raises:
            ValueError: a key is unknown or missing, or a value is of the wrong kind.
        """
        return typing.cast(Self, _build(cls, data, cls.__name__))

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The record that `to_json` wrote."""
        return cls.from_dict(json.loads(text))


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _build(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if isinstance(kind, type) and issubclass(kind, Record):
        return _build_record(kind, data, where)
    if origin in (typing.Union, types.UnionType):
        return _build_union(typing.get_args(kind), data, where)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ValueError(f"{where}: a list is needed, got {reprlib.repr(data)}")
        args = typing.get_args(kind)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_build(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        if len(args) != len(data):
            raise ValueError(f"{where}: {len(args)} values are needed, got {len(data)}")
        return tuple(_build(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(args, data, strict=True)))
    if origin is dict:
        if not isinstance(data, dict):
            raise ValueError(f"{where}: a mapping is needed, got {reprlib.repr(data)}")
        _, value_kind = typing.get_args(kind)
        return {str(key): _build(value_kind, item, f"{where}.{key}") for key, item in data.items()}
    if origin is typing.Literal:
        if data not in typing.get_args(kind):
            raise ValueError(
                f"{where}: one of {', '.join(map(str, typing.get_args(kind)))} is needed, got {reprlib.repr(data)}"
            )
        return data
    return _build_scalar(kind, data, where)


def _build_record(kind: type[Record], data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: a mapping is needed, got {reprlib.repr(data)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(fields)}")
    missing = [
        n
        for n, f in fields.items()
        if n not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {missing[0]!r} is missing")
    return kind(**{n: _build(hints[n], v, f"{where}.{n}") for n, v in data.items()})


def _build_union(options: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in options:
        return None
    problems = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _build(option, data, where)
        except ValueError as problem:
            problems.append(str(problem))
    raise ValueError(problems[0] if problems else f"{where}: {reprlib.repr(data)} does not fit")


def _build_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind is Any or (isinstance(data, kind) and not (kind in (int, float) and isinstance(data, bool))):
        return data
    raise ValueError(f"{where}: {getattr(kind, '__name__', kind)} is needed, got {reprlib.repr(data)}")
