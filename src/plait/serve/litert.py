"""LiteRT, the successor of TensorFlow Lite, in an environment of its own (`python -m plait.environments make litert`).

Its graphs have fixed sizes. So that one file serves every batch, it holds the graph at batch 1, 4, 16 ... and the largest, as
signatures that share their weights; a batch between two of them is filled up with copies of its last sample.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.ladder import at_batch, filled_up, ladder, sample_of
from plait.serve.own_environment import interpreter_of, missing_in
from plait.serve.subject import Subject

if TYPE_CHECKING:
    import torch

__all__ = ["LiteRt"]


class LiteRt(Backend):
    """`<entry>.tflite`."""

    name = "litert"
    imports = ("litert_torch", "ai_edge_litert")
    distributions = ("litert-torch", "ai-edge-litert")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8")

    def interpreter(self) -> str:
        """That of the environment `litert`."""
        return interpreter_of("litert")

    def missing(self) -> str:
        """The command that makes the environment."""
        return missing_in("litert", self.imports)

    def refusal(self, subject: Subject, precision: str) -> str:
        """What is known before anything is tried."""
        lengths = sorted(
            name for entry in subject.entries.values() for name in entry.dims if name not in {"batch", *subject.closed}
        )
        if lengths and len(subject.entries) > 1:
            return f"LiteRT's sizes are fixed, and {', '.join(lengths)} is open in an entry point that needs it"
        return super().refusal(subject, precision)

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """One file for each entry point, with a signature for each batch size of the ladder."""
        import litert_torch
        import torch

        for name, entry in subject.entries.items():
            lengths = [dim for dim in entry.dims if dim != "batch" and dim not in subject.closed]
            if lengths:
                raise ValueError(f"LiteRT's sizes are fixed: {', '.join(lengths)}")
            program = subject.program(name)
            options: dict[str, Any] = {}
            module: Any = program.module(check_guards=False)
            if precision == "int8":
                module, options = _quantised(module, subject, name)
            inputs = tuple(subject.inputs(sample_of(subject, entry), name))
            converter: Any = litert_torch
            with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                for size in ladder(subject, entry):
                    converter = converter.signature(f"b{size}", _Static(module), at_batch(inputs, entry, size))
                converter.convert(**options).export(str(folder / f"{name}.tflite"))
        return {}

    def load(self, artefact: Artefact) -> Runner:
        """A runner for each batch size of the ladder; inputs are cast to the types that the file has."""
        import torch
        from ai_edge_litert.interpreter import Interpreter

        path = artefact.folder / f"{artefact.entry.name}.tflite"
        interpreter = Interpreter(model_path=str(path), num_threads=artefact.threads)
        steps = sorted(int(key.removeprefix("b")) for key in interpreter.get_signature_list())
        runners: dict[int, Any] = {}
        wanted = [getattr(torch, spec.dtype) for spec in artefact.entry.outputs]
        batched = [bool(spec.shape) and spec.shape[0] == "batch" for spec in artefact.entry.inputs]
        open_outputs = [bool(spec.shape) and spec.shape[0] == "batch" for spec in artefact.entry.outputs]

        def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            sizes = [len(value) for value, is_batched in zip(inputs, batched, strict=True) if is_batched]
            have = sizes[0] if sizes else steps[0]
            size = next((step for step in steps if step >= have), None)
            if size is None:
                raise ValueError(f"a batch of {have}, and the file serves at most {steps[-1]}")
            if size not in runners:
                runners[size] = interpreter.get_signature_runner(f"b{size}")
            runner = runners[size]
            details = runner.get_input_details()
            given = {}
            for index, (value, is_batched) in enumerate(zip(inputs, batched, strict=True)):
                filled = filled_up(value, size) if is_batched and len(value) < size else value
                given[f"args_{index}"] = filled.detach().numpy().astype(details[f"args_{index}"]["dtype"], copy=False)
            results = runner(**given)
            outputs = []
            for index, (dtype, is_open) in enumerate(zip(wanted, open_outputs, strict=True)):
                # Copied: the interpreter writes its next outputs into the same memory.
                output = torch.from_numpy(results[f"output_{index}"].copy()).to(dtype)
                outputs.append(output[:have] if is_open and have < size else output)
            return outputs

        return run


def _Static(module: Any) -> Any:  # noqa: N802  a class that needs torch to exist
    """The module without the guards of its own export, for another one."""
    import torch

    class Static(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.training = False

        def train(self, mode: bool = True) -> Any:  # an exported program has no other mode
            return self

        def forward(self, *inputs: torch.Tensor) -> Any:
            return self.module(*inputs)

    return Static()


def _quantised(module: Any, subject: Subject, name: str) -> tuple[Any, dict[str, Any]]:
    """Weights of linear layers as int8, their inputs quantised as they come."""
    import torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    prepared = prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for sample in subject.entries[name].samples:
            prepared(*subject.inputs(sample, name))
    return convert_pt2e(prepared, fold_quantize=False), {"quant_config": QuantConfig(pt2e_quantizer=quantizer)}
