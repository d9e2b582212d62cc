"""TensorRT: prepared. ONNX that is checked here, and a script that builds the engine and checks it where the GPU is."""

from __future__ import annotations

import json
import py_compile
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.runtimes.onnxruntime import write_onnx
from plait.serve.subject import Subject

__all__ = ["TensorRt"]


class TensorRt(Backend):
    """`<entry>.onnx`, samples with eager's outputs, and `build_engine.py`. No line of that script has run on a GPU here."""

    name = "tensorrt"
    extra = "onnx"
    imports = ("onnx", "onnxscript")
    distributions = ("onnx", "onnxscript")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")
    status: ClassVar[Literal["run", "prepared"]] = "prepared"

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """Everything that can be checked without a GPU is: the ONNX by onnx (full check), the script by Python's compiler."""
        import onnx
        from safetensors.torch import load_file, save_file

        entries: dict[str, Any] = {}
        for name, entry in subject.entries.items():
            path = folder / f"{name}.onnx"
            write_onnx(subject, name, path)
            onnx.shape_inference.infer_shapes_path(str(path), str(path.with_suffix(".checked")), strict_mode=True)
            path.with_suffix(".checked").unlink()
            for i, sample in enumerate(entry.samples):
                save_file(load_file(subject.folder / sample.file), folder / f"{name}-{i}.safetensors")
            entries[name] = {
                "inputs": [[spec.name, *_profile(spec.shape, entry)] for spec in entry.inputs],
                "samples": [f"{name}-{i}.safetensors" for i in range(len(entry.samples))],
            }
        script = folder / "build_engine.py"
        text = _SCRIPT.replace("@ENTRIES@", json.dumps(entries, indent=4)).replace("@PRECISION@", precision)
        script.write_text(text, encoding="utf-8")
        sys.dont_write_bytecode = True
        py_compile.compile(str(script), cfile=str(folder / ".compiled"), doraise=True)
        (folder / ".compiled").unlink()
        has = "" if find_spec("tensorrt") else "; tensorrt is not installed here"
        return {"note": f"prepared, never run here: ONNX checked, build_engine.py compiles{has}"}

    def load(self, artefact: Artefact) -> Runner:
        """Nothing to run here."""
        raise NotImplementedError("TensorRT artefacts are prepared only")


def _profile(shape: tuple[int | str, ...], entry: Any) -> list[list[int]]:
    """Least, usual and largest shape of an input, for an optimisation profile."""
    usual = entry.samples[0].sizes
    rows: list[list[int]] = [[], [], []]
    for size in shape:
        low, high = entry.dims.get(size, (size, size)) if isinstance(size, str) else (size, size)
        for row, value in zip(rows, (low, usual.get(size, high) if isinstance(size, str) else size, high), strict=True):
            row.append(int(value))
    return rows


_SCRIPT = '''"""Builds a TensorRT engine from each ONNX file beside this script, and compares it with PyTorch's outputs.

    pip install tensorrt torch safetensors
    python build_engine.py

Written by plait; it has not been run where it was written, which had no GPU.
"""

import sys
from pathlib import Path

import tensorrt as trt
import torch
from safetensors.torch import load_file

PRECISION = "@PRECISION@"
LIMIT = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2}[PRECISION]  # relative, max over max; fp32 may use TF32 unless cleared
ENTRIES = @ENTRIES@
HERE = Path(__file__).resolve().parent
LOGGER = trt.Logger(trt.Logger.WARNING)
DTYPES = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.BF16: torch.bfloat16,
    trt.DataType.INT64: torch.int64,
    trt.DataType.INT32: torch.int32,
    trt.DataType.BOOL: torch.bool,
}


def build(name, inputs):
    builder = trt.Builder(LOGGER)
    network = builder.create_network()
    parser = trt.OnnxParser(network, LOGGER)
    if not parser.parse_from_file(str(HERE / f"{name}.onnx")):
        for i in range(parser.num_errors):
            print(parser.get_error(i), file=sys.stderr)
        sys.exit(f"{name}: TensorRT does not take this model")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if PRECISION != "fp32":
        config.set_flag(trt.BuilderFlag.FP16 if PRECISION == "fp16" else trt.BuilderFlag.BF16)
    if any(least != most for _, least, _, most in inputs):
        profile = builder.create_optimization_profile()
        for tensor, least, usual, most in inputs:
            profile.set_shape(tensor, least, usual, most)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        sys.exit(f"{name}: the engine could not be built")
    partial = HERE / f"{name}.engine.tmp"
    partial.write_bytes(engine)
    partial.replace(HERE / f"{name}.engine")
    return trt.Runtime(LOGGER).deserialize_cuda_engine(engine)


def run(engine, given):
    context = engine.create_execution_context()
    held = {}
    for i in range(engine.num_io_tensors):
        tensor = engine.get_tensor_name(i)
        if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT:
            held[tensor] = given[tensor].cuda().contiguous()
            context.set_input_shape(tensor, tuple(held[tensor].shape))
    outputs = []
    for i in range(engine.num_io_tensors):
        tensor = engine.get_tensor_name(i)
        if engine.get_tensor_mode(tensor) == trt.TensorIOMode.OUTPUT:
            dtype = DTYPES[engine.get_tensor_dtype(tensor)]
            held[tensor] = torch.empty(tuple(context.get_tensor_shape(tensor)), dtype=dtype, device="cuda")
            outputs.append(tensor)
    for tensor, value in held.items():
        context.set_tensor_address(tensor, value.data_ptr())
    stream = torch.cuda.Stream()
    context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    return {tensor: held[tensor].cpu() for tensor in outputs}


def main():
    worst = 0.0
    for name, entry in ENTRIES.items():
        engine = build(name, entry["inputs"])
        for file in entry["samples"]:
            held = load_file(HERE / file)
            given = {key[3:]: value for key, value in held.items() if key.startswith("in.")}
            for tensor, got in run(engine, given).items():
                want = held.get(f"out.{tensor}", held.get(f"out.{tensor.removesuffix('_out')}"))
                gap = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)
                print(f"{name} {file} {tensor}: relative error {gap:.2e}")
                worst = max(worst, float(gap))
    if not worst <= LIMIT:
        sys.exit(f"relative error {worst:.2e} is over {LIMIT}")


main()
'''
