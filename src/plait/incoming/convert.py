"""Models of frameworks that cannot be installed beside plait's torch, to ONNX files that `onnx:FILE` takes.

SavedModel folder, .keras, .h5, .tflite, frozen .pb ──▶ environment `tensorflow` (tf2onnx) ──▶ model.onnx ──▶ onnx:model.onnx
MXNet symbol.json and .params                       ──▶ environment `mxnet`                ──▶ model.onnx
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plait.environments.run import run_in
from plait.errors import PlaitError, TargetError

__all__ = ["from_mxnet", "from_tensorflow"]

_SCRIPTS = Path(__file__).parent / "scripts"
_TIME_LIMIT = 900.0  # seconds
_FILES = (".keras", ".h5", ".hdf5", ".tflite", ".pb")


def from_tensorflow(
    path: Path | str,
    output: Path | str,
    *,
    signature: str = "serving_default",
    opset: int = 17,
    time_limit: float = _TIME_LIMIT,
) -> dict[str, Any]:
    """Write a SavedModel, .keras, .h5, .tflite or frozen .pb file as ONNX; gives the names of inputs and outputs, and versions.

    The model is converted for inference (dropout is gone, batch norm by its moving statistics); trained further, its batch
    norms work on batches again. The file is there whole or not at all.

    Raises:
        RequestError: the environment `tensorflow` is not made.
        TargetError: there is no such model, or what came out is no file that plait reads.
        PlaitError: TensorFlow or tf2onnx refuses it, with their words.
        WorkerError: the conversion crashed or took longer than `time_limit` seconds.
    """
    source = Path(path)
    is_folder = (source / "saved_model.pb").is_file()
    if not is_folder and not (source.is_file() and source.suffix in _FILES):
        what = (
            "no such file"
            if not source.exists()
            else f"neither a SavedModel (saved_model.pb) nor a file of {', '.join(_FILES)}"
        )
        raise TargetError(f"{source}: {what}")
    request = {"path": str(source.resolve()), "signature": signature, "opset": opset}
    return _converted("tensorflow", "from_tensorflow.py", request, Path(output), time_limit)


def from_mxnet(
    symbol: Path | str,
    params: Path | str,
    output: Path | str,
    *,
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[str] = (),
    dynamic: bool = False,
    time_limit: float = _TIME_LIMIT,
) -> dict[str, Any]:
    """Write an MXNet model (`model-symbol.json`, `model-0000.params`) as ONNX; gives names and versions.

    `shapes` of its inputs, the batch first; `dynamic` leaves the batch open. MXNet's exporter marks its files with the opset of
    the installed onnx, though its operators are those of opset 13: the mark is put right.

    Raises:
        RequestError, TargetError, PlaitError, WorkerError: as `from_tensorflow`.
    """
    files = [Path(symbol), Path(params)]
    for file in files:
        if not file.is_file():
            raise TargetError(f"{file}: no such file")
    request = {
        "symbol": str(files[0].resolve()),
        "params": str(files[1].resolve()),
        "shapes": [list(shape) for shape in shapes],
        "dtypes": list(dtypes) or ["float32"] * len(shapes),
        "dynamic": dynamic,
    }
    return _converted("mxnet", "from_mxnet.py", request, Path(output), time_limit)


def _converted(
    environment: str, script: str, request: dict[str, Any], output: Path, time_limit: float
) -> dict[str, Any]:
    from plait.capture.onnx.read import read_onnx

    if not output.parent.is_dir():
        raise TargetError(f"{output}: its folder is not there")
    with tempfile.TemporaryDirectory(prefix="plait-incoming-") as folder:
        made = Path(folder, "model.onnx")
        reply = run_in(environment, _SCRIPTS / script, {**request, "output": str(made)}, time_limit=time_limit)
        if not made.is_file():
            raise PlaitError(f"{script.removesuffix('.py')}: it wrote no file")
        read_onnx(made)
        partial = output.with_name(f".{output.name}.partial")
        try:
            shutil.copyfile(made, partial)
            partial.replace(output)
        except OSError as problem:
            raise PlaitError(f"{output}: {problem.strerror}") from None
        finally:
            partial.unlink(missing_ok=True)
    return reply
