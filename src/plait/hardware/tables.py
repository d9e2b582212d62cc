"""Reading the catalogue's CSV files: columns checked, numbers checked, every message with its line."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from plait.errors import HardwareError

__all__ = ["DATA", "choice", "number", "own_folder", "rows", "table_path", "usable"]

_T = TypeVar("_T")

DATA = Path(__file__).parent / "data"


def own_folder() -> Path:
    """Where `plait hardware refresh` keeps newer tables."""
    root = os.environ.get("PLAIT_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "plait" / "tables"


def table_path(name: str) -> Path:
    """The table called `name`: the refreshed one where there is one, else the shipped one."""
    own = own_folder() / name
    return own if own.is_file() else DATA / name


def usable(name: str, read: Callable[[Path], _T]) -> _T:
    """What `read` makes of the table called `name`; of the shipped one where the refreshed one is broken, which is said.

    Raises:
        HardwareError: the shipped one is broken.
    """
    path = table_path(name)
    try:
        return read(path)
    except HardwareError as problem:
        if path == DATA / name:
            raise
        sys.stderr.write(f"{problem.message}: it is left aside, the shipped table is used (delete or refresh it)\n")
        return read(DATA / name)


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each line as (where, cells), cells stripped.

    Raises:
        HardwareError: the file is missing, is not UTF-8, lacks a column, or a line has too many cells.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise HardwareError(f"{path}: column {missing[0]!r} is missing", hint=f"needed: {', '.join(columns)}")
            for cells in reader:
                where = f"{path}, line {reader.line_num}"
                if None in cells:
                    raise HardwareError(f"{where}: more cells than columns", hint="quote a cell that holds a comma")
                yield where, {key: (value or "").strip() for key, value in cells.items()}
    except (OSError, UnicodeDecodeError) as problem:
        raise HardwareError(f"{path}: {problem}") from None


def number(where: str, cells: dict[str, str], column: str, *, scale: float = 1.0, high: float = 1e9) -> float | None:
    """The cell as a number times `scale`; None where it is empty.

    Raises:
        HardwareError: it is no number, negative, or above `high`.
    """
    text = cells.get(column, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise HardwareError(f"{where}: {column}={text!r} is not a number") from None
    if not 0 <= value <= high:
        raise HardwareError(f"{where}: {column}={text} is outside 0 to {high:g}")
    return value * scale


def choice(where: str, cells: dict[str, str], column: str, words: Sequence[str]) -> str:
    """The cell, which must be one of `words`.

    Raises:
        HardwareError: it is another.
    """
    value = cells[column]
    if value not in words:
        raise HardwareError(f"{where}: {column}={value!r} is not one of {', '.join(words)}")
    return value
