"""One file of weights for several ONNX models: a decoder's forward, prefill and decode hold the same ones.

forward.onnx, prefill.onnx, decode.onnx     graphs, small constants, and where each weight lies (offset, length)
weights.data                                every weight once, by its bytes
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plait.serve.runtimes.onnx_file import tensors_of

__all__ = ["WEIGHTS", "share_weights"]

WEIGHTS = "weights.data"
_LEAST = 1024  # bytes; what is smaller stays in the model, which is also what onnx's own writer does
_ALIGNED = 4096  # a page: onnxruntime maps weights into memory where they begin on one
_BESIDE = 64  # bytes; weights smaller than a page are only kept on a cache line


def share_weights(paths: Iterable[Path]) -> int:
    """Move the weights of models in one folder into `weights.data` beside them; gives its bytes.

    One model at a time is in memory. The models' data files of their own are gone afterwards.
    """
    import onnx

    paths = list(paths)
    known: dict[bytes, tuple[int, int]] = {}
    old: set[Path] = set()
    with (paths[0].parent / WEIGHTS).open("wb") as file:
        for path in paths:
            old |= {path.parent / name for name in _data_files(path)}
            model = onnx.load(str(path))
            for tensor in tensors_of(model):
                if tensor.HasField("raw_data") and len(tensor.raw_data) >= _LEAST:
                    _point(tensor, *_place(file, known, tensor.raw_data))
            path.write_bytes(model.SerializeToString())
        size = file.tell()
    for part in old:
        part.unlink(missing_ok=True)
    return size


def _data_files(path: Path) -> set[str]:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return {entry.value for tensor in tensors_of(model) for entry in tensor.external_data if entry.key == "location"}


def _place(file: Any, known: dict[bytes, tuple[int, int]], data: bytes) -> tuple[int, int]:
    digest = hashlib.sha256(data).digest()
    if digest not in known:
        step = _ALIGNED if len(data) >= _ALIGNED else _BESIDE
        file.write(b"\0" * (-file.tell() % step))
        known[digest] = (file.tell(), len(data))
        file.write(data)
    return known[digest]


def _point(tensor: Any, offset: int, length: int) -> None:
    import onnx

    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
