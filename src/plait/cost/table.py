"""Rows of published measurements, as `plait validate` reads them: numbers checked, everything else left as text."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from plait.errors import TableError

__all__ = ["COLUMNS", "Row", "read_table"]

_NUMBERS = ("params_b", "layers", "hidden", "ffn_hidden", "heads", "kv_heads", "vocab", "seq_len", "moe_experts", "moe_topk", "n_accelerators", "nodes_gpus_per_node", "micro_batch", "global_batch", "dp", "tp", "pp", "cp", "ep", "virtual_pp", "tokens_per_s_per_accel", "step_time_s", "tflops_per_accel", "mfu_pct", "hfu_pct", "peak_memory_gib")  # fmt: skip
_TEXTS = ("id", "source", "model_name", "accelerator", "accelerator_as_printed", "interconnect", "precision", "sharding",
          "activation_recompute", "notes", "apart")  # fmt: skip
COLUMNS = (*_TEXTS, *_NUMBERS)
# Without these columns no row of a table can be predicted.
_NEEDED = (("accelerator", "accelerator_as_printed"), ("layers",), ("hidden",), ("seq_len",), ("n_accelerators",),
           ("global_batch",))  # fmt: skip
_WHOLE = frozenset(_NUMBERS[1:20]) - {"params_b"}
_MOST = {"params_b": 1e6, "layers": 1e4, "hidden": 1e7, "seq_len": 1e9, "n_accelerators": 1e7, "mfu_pct": 1e3}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    line: int
    texts: dict[str, str]
    numbers: dict[str, float]
    """Only those that are there."""

    def text(self, name: str) -> str:
        """The cell, '' where it is empty or the column is missing."""
        return self.texts.get(name, "")

    def number(self, name: str) -> float | None:
        """The cell, None where it is empty or the column is missing."""
        return self.numbers.get(name)

    def whole(self, name: str) -> int | None:
        """The cell as a whole number."""
        value = self.numbers.get(name)
        return None if value is None else int(value)

    @property
    def id(self) -> str:
        """The row's name, or its line where it has none."""
        return self.text("id") or f"line-{self.line}"

    @property
    def group(self) -> str:
        """The source: the id up to its last hyphen."""
        return self.id.rsplit("-", 1)[0]


def read_table(path: Path | str) -> list[Row]:
    """The table's rows.

    Raises:
        TableError: the file cannot be read, a needed column is missing, or a cell is no sensible number.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            _check_header(path, header)
            return [_row(path, reader.line_num, cells) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise TableError(f"table {path}: {problem}") from None


def _check_header(path: Path, header: list[str]) -> None:
    if not header:
        raise TableError(f"table {path}: it is empty")
    for options in _NEEDED:
        if not any(name in header for name in options):
            raise TableError(
                f"table {path}: column {options[0]!r} is missing, no row can be predicted without it",
                hint=f"columns that are read: {', '.join(COLUMNS)}",
            )


def _row(path: Path, line: int, cells: dict[str, str | list[str] | None]) -> Row:
    where = f"table {path}, line {line}"
    if None in cells:
        raise TableError(f"{where}: more cells than columns", hint="quote a cell that holds a comma")
    texts, numbers = {}, {}
    for name, cell in cells.items():
        text = cell.strip() if isinstance(cell, str) else ""
        if name in _NUMBERS and text:
            numbers[name] = _number(where, name, text)
        elif text:
            texts[name] = text
    return Row(line, texts, numbers)


def _number(where: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise TableError(f"{where}: {name}={text!r} is not a number") from None
    if not math.isfinite(value) or not 0 <= value <= _MOST.get(name, 1e12):
        raise TableError(f"{where}: {name}={text} is not a believable figure")
    if name in _WHOLE and value != int(value):
        raise TableError(f"{where}: {name}={text} is not a whole number")
    if value == 0 and name not in ("moe_experts", "moe_topk", "mfu_pct", "hfu_pct"):
        raise TableError(f"{where}: {name}=0: leave a cell empty that is not known")
    return value
