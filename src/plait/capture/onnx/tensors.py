"""Tensors of an ONNX file: never more or fewer numbers than the shape says, and never from outside the model's folder."""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from plait.errors import TargetError

__all__ = ["Tensors"]

_LARGEST = 1 << 40  # elements of one tensor; far above anything real, far below what overflows
_LARGEST_SPARSE = 1 << 28  # elements that a sparse tensor may fill: 1 GiB in float32


class Tensors:
    """Tensors of the file, their data beside or inside it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, tensor: Any, name: str) -> np.ndarray[Any, Any]:
        """The values, never more or fewer than the shape says; floats of 8 bits and fewer as float32."""
        found = self._read(tensor, name)
        return found.astype(np.float32) if found.dtype.name.startswith(("float8", "float6")) else found

    def _read(self, tensor: Any, name: str) -> np.ndarray[Any, Any]:
        import onnx

        dims = [int(dim) for dim in tensor.dims]
        count = math.prod(dims)
        if any(dim < 0 for dim in dims) or count > _LARGEST:
            self._refuse(name, f"its shape {dims} is not possible")
        kinds = onnx.TensorProto
        if tensor.data_type in (kinds.STRING, kinds.UNDEFINED):
            self._refuse(name, "it holds text or nothing")
        try:
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        except KeyError:
            self._refuse(name, f"its type ({tensor.data_type}) is unknown")
        if dtype.itemsize * 8 != _bits(tensor.data_type):
            return self._small(tensor, name, dims)
        if tensor.data_location == kinds.EXTERNAL:
            return self._external(tensor, name, dtype, dims)
        if tensor.HasField("raw_data"):
            if len(tensor.raw_data) != count * dtype.itemsize:
                self._refuse(name, f"{dims} needs {count * dtype.itemsize} bytes, the file has {len(tensor.raw_data)}")
            return np.frombuffer(tensor.raw_data, dtype=dtype.newbyteorder("<")).astype(dtype).reshape(dims)
        try:
            values = onnx.numpy_helper.to_array(tensor)
        except Exception as problem:  # numpy's and protobuf's own, on data that do not fit the shape
            why = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
            self._refuse(name, f"its data do not fit its shape {dims} ({why})")
        if list(values.shape) != dims:
            self._refuse(name, f"its data do not fit its shape {dims}")
        return np.asarray(values)

    def read_sparse(self, sparse: Any, name: str) -> np.ndarray[Any, Any]:
        """A sparse tensor with its zeros filled in."""
        dims = [int(dim) for dim in sparse.dims]
        count = math.prod(dims)
        if any(dim < 1 for dim in dims) or count > _LARGEST_SPARSE:
            self._refuse(name, f"its shape {dims} is not possible, or too large to fill with zeros")
        values, indices = self.read(sparse.values, name), self.read(sparse.indices, f"{name} (indices)")
        flat = indices if indices.ndim == 1 else self._flat(indices, dims, name)
        if values.ndim != 1 or len(flat) != len(values) or (len(flat) and not 0 <= flat.min() <= flat.max() < count):
            self._refuse(name, f"its indices do not fit its values or its shape {dims}")
        found = np.zeros(count, values.dtype)
        found[flat.astype(np.int64)] = values
        return found.reshape(dims)

    def _flat(self, indices: np.ndarray[Any, Any], dims: list[int], name: str) -> np.ndarray[Any, Any]:
        if indices.ndim != 2 or indices.shape[1] != len(dims) or (indices < 0).any() or (indices >= dims).any():
            self._refuse(name, f"its indices do not fit its shape {dims}")
        return np.asarray(np.ravel_multi_index(tuple(indices.T.astype(np.int64)), tuple(dims)))

    def _small(self, tensor: Any, name: str, dims: list[int]) -> np.ndarray[Any, Any]:
        """Numbers of fewer than 8 bits, several in a byte; as whole numbers of 8 bits, or as float32."""
        import onnx

        bits, count = _bits(tensor.data_type), math.prod(dims)
        wanted = -(-count * bits // 8)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            file, offset = self._place(tensor, name, dims, wanted)
            raw = np.fromfile(file, dtype=np.uint8, count=wanted, offset=offset).tobytes() if wanted else b""
            inside = onnx.TensorProto(dims=dims, data_type=tensor.data_type, raw_data=raw)
        else:
            inside = tensor
            if tensor.HasField("raw_data") and len(tensor.raw_data) != wanted:
                self._refuse(name, f"{dims} needs {wanted} bytes, the file has {len(tensor.raw_data)}")
        try:
            values = np.asarray(onnx.numpy_helper.to_array(inside))
        except Exception as problem:  # numpy's and protobuf's own, on data that do not fit the shape
            self._refuse(name, f"its data do not fit its shape {dims} ({type(problem).__name__})")
        if list(values.shape) != dims:
            self._refuse(name, f"its data do not fit its shape {dims}")
        kind = np.float32 if "float" in values.dtype.name else np.uint8 if "uint" in values.dtype.name else np.int8
        return values.astype(kind)

    def _external(self, tensor: Any, name: str, dtype: np.dtype[Any], dims: list[int]) -> np.ndarray[Any, Any]:
        wanted = math.prod(dims) * dtype.itemsize
        file, offset = self._place(tensor, name, dims, wanted)
        if not wanted:
            return np.zeros(dims, dtype)
        values = np.fromfile(file, dtype=dtype.newbyteorder("<"), count=math.prod(dims), offset=offset)
        return values.astype(dtype, copy=False).reshape(dims)

    def _place(self, tensor: Any, name: str, dims: list[int], wanted: int) -> tuple[Path, int]:
        """(data file, first byte) of data that lie outside."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", wanted))
        except ValueError:
            self._refuse(name, "its place in the data file is no number")
        file = self._data_file(entries.get("location", ""), name)
        size = file.stat().st_size
        if length != wanted or offset < 0 or offset + length > size:
            self._refuse(
                name, f"{dims} needs {wanted} bytes, the data file {file.name} has {max(size - offset, 0)} there"
            )
        return file, offset

    def _data_file(self, location: str, name: str) -> Path:
        """The data file, which lies in the model's folder or under it, and not through a symbolic link."""
        parts = location.replace("\\", "/").split("/")
        if not location or "\0" in location or not parts[0] or ":" in parts[0]:
            self._refuse(name, f"its data lie at {location!r}, which is no place in the model's folder")
        if ".." in parts:
            self._refuse(name, f"its data lie at {location!r}, outside the model's folder")
        file = self._path.parent
        for part in parts:
            file /= part
            if file.is_symlink():
                self._refuse(name, f"its data lie at {location!r}, which is a symbolic link")
        try:
            mode = file.stat().st_mode
        except OSError:
            self._refuse(name, f"its data file {location!r} is not there")
        if not stat.S_ISREG(mode):
            self._refuse(name, f"its data lie at {location!r}, which is no file")
        return file

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise TargetError(f"{self._path}: tensor {name!r}: {why}")


def _bits(data_type: int) -> int:
    import onnx

    kinds = onnx.TensorProto
    small = {getattr(kinds, kind, -1): 4 for kind in ("UINT4", "INT4", "FLOAT4E2M1")}
    small |= {getattr(kinds, kind, -1): 2 for kind in ("UINT2", "INT2")}
    found = small.get(data_type)
    return found or int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type)).itemsize) * 8
