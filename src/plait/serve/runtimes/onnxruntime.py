"""ONNX by torch's dynamo exporter, run by onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.runtimes.casting import cast, in_precision
from plait.serve.subject import Entry, Subject

if TYPE_CHECKING:
    import torch

__all__ = ["OnnxRuntime", "write_onnx"]

OPSET = 20  # the newest whose operators every stable runtime of 2026 reads; the exporter implements 18 and up
_PROTOBUF_LIMIT = 1_900_000_000  # bytes; a protobuf message ends at 2 GiB, larger weights go into a file beside it


class OnnxRuntime(Backend):
    """`<entry>.onnx`, with its weights inside; those of several entry points once, in `weights.data`."""

    name = "onnxruntime"
    extra = "onnx"
    imports = ("onnx", "onnxscript", "onnxruntime")
    distributions = ("onnx", "onnxscript", "onnxruntime")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8", "int8-weight")

    def refusal(self, subject: Subject, precision: str) -> str:
        """Int8 multiplies matrices alone; a model that mostly convolves would only get slower."""
        if precision.startswith("int8") and subject.convolutions and not _has_linear(subject):
            return "onnxruntime's int8 convolutions are 2.5 times slower than fp32 on this kind of CPU, and it has no matrix multiplications"
        return super().refusal(subject, precision)

    def knobs(self) -> Mapping[str, Sequence[Any]]:
        """What changes latency, and results by rounding at most."""
        return {
            "spinning": (True, False),
            "optimisation": ("all", "extended", "basic"),
            "inter_op": (0, 2),  # threads that run independent operators beside each other; 0: one after another
            "arena": (True, False),
            "memory_pattern": (True, False),
            "prepacking": (True, False),
            "dynamic_block": (0, 4),  # a matrix multiplication is cut into smaller blocks towards its end
        }

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """One file for each entry point, checked by onnx; quantised afterwards."""
        from plait.serve.decoding.cache_update import scattered
        from plait.serve.runtimes.complex_pairs import in_pairs

        opset = 0
        for name in subject.entries:
            path = folder / f"{name}.onnx"
            if not precision.startswith("int8"):
                opset = write_onnx(subject, name, path, scattered(cast(in_pairs(subject.program(name)), precision)))
                continue
            whole = folder / f"{name}.fp32.onnx"
            opset = write_onnx(subject, name, whole, scattered(in_pairs(subject.program(name))))
            (_quantise if precision == "int8" else _compress)(whole, path)
            for part in folder.glob(f"{name}.fp32.*"):
                part.unlink()
        if len(subject.entries) > 1:
            from plait.serve.runtimes.onnx_weights import share_weights

            share_weights(folder / f"{name}.onnx" for name in subject.entries)
        return {"opset": opset}

    def load(self, artefact: Artefact) -> Runner:
        """A session on the CPU with a fixed number of threads."""
        import onnxruntime
        import torch

        from plait.serve.runtimes.onnx_file import check_onnx

        path = artefact.folder / f"{artefact.entry.name}.onnx"
        check_onnx(path)
        knobs = artefact.knobs or {}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = artefact.threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if knobs.get("spinning", True) else "0")
        if knobs.get("inter_op"):
            options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
            options.inter_op_num_threads = int(knobs["inter_op"])
        options.enable_cpu_mem_arena = bool(knobs.get("arena", True))
        options.enable_mem_pattern = bool(knobs.get("memory_pattern", True))
        if not knobs.get("prepacking", True):
            options.add_session_config_entry("session.disable_prepacking", "1")
        if knobs.get("dynamic_block"):
            options.add_session_config_entry("session.dynamic_block_base", str(int(knobs["dynamic_block"])))
        level = str(knobs.get("optimisation", "all")).upper()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        taken = {value.name for value in session.get_inputs()}
        names = [spec.name for spec in artefact.entry.inputs]
        is_complex = [spec.dtype.startswith("complex") for spec in artefact.entry.outputs]

        def run(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
            feed = {n: _real(t.detach()).numpy() for n, t in zip(names, inputs, strict=True) if n in taken}
            given = [torch.from_numpy(value) for value in session.run(None, feed)]
            # ONNX has real numbers alone: the exporter writes a complex one as two in a last dimension.
            return [torch.view_as_complex(t) if c else t for t, c in zip(given, is_complex, strict=True)]

        return in_precision(run, artefact.entry, artefact.precision)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def write_onnx(subject: Subject, name: str, path: Path, program: torch.export.ExportedProgram | None = None) -> int:
    """Write an entry point as ONNX with its inputs and outputs under their own names; gives the opset it came out with.

    `program`: to be written instead of the entry point's own, with the same inputs and outputs in another type.
    """
    import onnx
    import torch

    from plait.serve.runtimes.complex_pairs import in_pairs
    from plait.serve.runtimes.lacking import converted

    entry = subject.entries[name]

    def convert(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in entry.inputs],
            output_names=[_distinct(spec.name, entry) for spec in entry.outputs],
            verbose=False,
        )
        assert written is not None
        return written

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = converted(convert, program or in_pairs(subject.program(name)))
    written.save(str(path), external_data=subject.parameter_bytes > _PROTOBUF_LIMIT)
    # By its path, since a file with data beside it cannot be checked in memory.
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    return int(next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")))


def _distinct(name: str, entry: Entry) -> str:
    """ONNX has one space of names for inputs and outputs."""
    return f"{name}_out" if any(spec.name == name for spec in entry.inputs) else name


def _quantise(whole: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(whole), str(path), weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
    )


def _compress(whole: Path, path: Path) -> None:
    """Weights in blocks of 32 as int8, multiplied in float."""
    import logging

    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as blocks

    logging.getLogger(blocks.__name__).setLevel(logging.WARNING)
    config = blocks.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=0, bits=8)
    quantizer = blocks.MatMulNBitsQuantizer(onnx.load(str(whole)), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), False)


def _has_linear(subject: Subject) -> bool:
    kinds = ("aten.linear", "aten.matmul", "aten.addmm", "aten.mm", "aten.bmm")
    return any(
        str(node.target).startswith(kinds) for name in subject.entries for node in subject.program(name).graph.nodes
    )
