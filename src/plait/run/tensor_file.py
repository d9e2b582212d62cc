"""Writing safetensors one tensor at a time, so that a file may be larger than memory.

    8 bytes: length of the header | header: JSON, names to dtype, shape and place | the tensors' bytes, one after another

Reading is the safetensors library's own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

__all__ = ["write_tensors"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors spells dtypes. Source: safetensors 0.8, `safetensors/src/tensor.rs`."""


def write_tensors(
    path: Path,
    specs: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write the tensors named by `specs` (name, dtype, shape), taken from `tensors` in the same order; gives the bytes.

    Tensors may be on any device; one at a time is copied to the CPU. The file is on the disk when this returns.

    Raises:
        ValueError: safetensors has no name for a dtype, or a tensor is not what its spec says.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, dtype, shape in specs:
        if dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors files cannot hold {str(dtype).removeprefix('torch.')}")
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + nbytes]}
        place += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for (name, dtype, shape), tensor in zip(specs, tensors, strict=True):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, announced {dtype} {shape}")
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()
