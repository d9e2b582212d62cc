"""What a checkpoint's directory holds, as one JSON file, and reading the pieces it points at.

    step-00000120/
        index.json              names, shapes, dtypes; of each name its pieces, and where each lies; the plain state
        rank-00000.safetensors  the pieces that rank 0 wrote, one tensor each
        rank-00000.json         that rank's own state (generators)
        model.safetensors       the whole model, for everything that is not plait

Everything in a file is checked before it is used, and nothing is read by pickle.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from plait.errors import CheckpointError

__all__ = ["INDEX", "Index", "PieceFiles", "StoredPiece", "StoredTensor", "write_text"]

INDEX = "index.json"
_FORMAT = "plait checkpoint 1"


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A box of a whole tensor and the file it lies in."""

    offsets: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A name of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """What a checkpoint holds."""

    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, int]
    """Size in bytes of every file of pieces."""
    world_size: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Plain values: step, state, aliases, the model's names."""

    def write(self, path: Path) -> None:
        """One JSON file."""
        tensors = {
            name: {
                "shape": tensor.shape,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "pieces": [[p.offsets, p.size, p.file, p.key] for p in tensor.pieces],
            }
            for name, tensor in sorted(self.tensors.items())
        }
        data = {"format": _FORMAT, "world_size": self.world_size, "files": dict(self.files), **self.extra}
        write_text(path, json.dumps({**data, "tensors": tensors}))

    @classmethod
    def read(cls, directory: Path) -> Index:
        """The checked index of a checkpoint.

        Raises:
            CheckpointError: it is missing or malformed, or a file is missing or not of its size.
        """
        path = directory / INDEX
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"checkpoint {directory}: there is no {INDEX}; it is not a complete checkpoint"
            ) from None
        except (OSError, ValueError) as problem:
            raise CheckpointError(f"checkpoint {directory}: {INDEX} cannot be read: {problem}") from None
        try:
            if data.pop("format") != _FORMAT:
                raise ValueError(f"not of the format {_FORMAT!r}")
            tensors = {str(name): _stored(name, value) for name, value in data.pop("tensors").items()}
            files = {_plain_name(name): int(nbytes) for name, nbytes in data.pop("files").items()}
            index = cls(tensors, files, int(data.pop("world_size")), data)
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise CheckpointError(f"checkpoint {directory}: {INDEX} is malformed: {problem!r}") from None
        for name, nbytes in index.files.items():
            file = directory / name
            found = file.stat().st_size if file.is_file() else None
            if found != nbytes:
                what = "is missing" if found is None else f"is truncated or changed: {found} bytes of {nbytes}"
                raise CheckpointError(f"checkpoint {directory}: {name} {what}")
        return index


def write_text(path: Path, text: str) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _stored(name: str, value: Any) -> StoredTensor:
    shape = _sizes(value["shape"])
    dtype = getattr(torch, value["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: {value['dtype']} is no dtype")
    pieces = tuple(
        StoredPiece(_sizes(o), _sizes(n), _plain_name(file), str(key)) for o, n, file, key in value["pieces"]
    )
    for piece in pieces:
        ends = [o + n for o, n in zip(piece.offsets, piece.size, strict=True)]
        if len(ends) != len(shape) or any(end > whole for end, whole in zip(ends, shape, strict=True)):
            raise ValueError(f"{name}: a piece lies outside of {shape}")
    if sum(math.prod(piece.size) for piece in pieces) != math.prod(shape):
        raise ValueError(f"{name}: its pieces do not make up {shape}")
    return StoredTensor(shape, dtype, pieces)


def _sizes(values: Any) -> tuple[int, ...]:
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError(f"{values} are no sizes")
    return tuple(values)


def _plain_name(name: Any) -> str:
    """A file name that stays in its directory."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no file name")
    return name


class PieceFiles:
    """The open files of a checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, piece: StoredPiece, box: tuple[slice, ...]) -> torch.Tensor:
        """A part of a stored piece, on the CPU; only it is read.

        Raises:
            CheckpointError: the file is broken, or does not hold what the index says.
        """
        try:
            if piece.file not in self._open:
                file = safe_open(self._directory / piece.file, framework="pt")
                self._open[piece.file] = self._stack.enter_context(file)
            part = self._open[piece.file].get_slice(piece.key)
            if tuple(part.get_shape()) != piece.size:
                raise CheckpointError(f"checkpoint {self._directory}: {piece.key} in {piece.file} is not as indexed")
            tensor: torch.Tensor = part[box] if box else self._open[piece.file].get_tensor(piece.key)
        except (SafetensorError, OSError, IndexError) as problem:
            raise CheckpointError(f"checkpoint {self._directory}: {piece.file} is broken: {problem}") from None
        return tensor

    def whole(self, stored: StoredTensor) -> torch.Tensor:
        """A tensor put together from its pieces, on the CPU."""
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        for piece in stored.pieces:
            if math.prod(piece.size):
                box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.size, strict=True))
                whole[box] = self.read(piece, tuple(slice(0, n) for n in piece.size))
        return whole
