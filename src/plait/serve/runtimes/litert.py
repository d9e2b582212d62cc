"""LiteRT, the successor of TensorFlow Lite, in an environment of its own (`python -m plait.environments make litert`).

Its graphs have fixed sizes. So that one file serves every batch, it holds the graph of every rung of a ladder (`ladder`), as
signatures that share their weights.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from plait.serve.backend import Artefact, Runner
from plait.serve.runtimes.ladder import Rung, inputs_at, rungs, served, unfit
from plait.serve.runtimes.litert_file import PRECISIONS, shrink
from plait.serve.runtimes.own_environment import OwnEnvironment
from plait.serve.subject import Subject

if TYPE_CHECKING:
    import torch

__all__ = ["LiteRt"]


class LiteRt(OwnEnvironment):
    """`<entry>.tflite`."""

    name = "litert"
    imports = ("litert_torch", "ai_edge_litert")
    distributions = ("litert-torch", "ai-edge-litert")
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS

    def refusal(self, subject: Subject, precision: str) -> str:
        """What is known before anything is tried."""
        why = unfit(subject) if len(subject.entries) > 1 else ""
        return f"litert: {why}" if why else super().refusal(subject, precision)

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """One file for each entry point, with a signature for each batch size of the ladder."""
        import litert_torch
        import torch

        from plait.serve.runtimes.complex_pairs import in_pairs
        from plait.serve.runtimes.scattering import without_scattering
        from plait.serve.runtimes.spelled import SORTING

        for name in subject.entries:
            module: Any = without_scattering(in_pairs(subject.program(name)), SORTING).module(check_guards=False)
            file = folder / f"{name}.tflite"
            converter: Any = litert_torch
            with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                for rung in rungs(subject, name):
                    converter = converter.signature(rung.name, _Static(module), inputs_at(subject, name, rung))
                try:
                    converter.convert().export(str(file))
                except Exception as problem:
                    raise RuntimeError(_with_code(str(problem))) from problem
                shrink(file, precision)
        return {}

    def load(self, artefact: Artefact) -> Runner:
        """A runner for each rung of the ladder; inputs are cast to the types that the file has."""
        import torch
        from ai_edge_litert.interpreter import Interpreter

        def interpreter(name: str) -> Any:
            return Interpreter(model_path=str(artefact.folder / f"{name}.tflite"), num_threads=artefact.threads)

        interpreters = {artefact.entry.name: interpreter(artefact.entry.name)}
        runners: dict[tuple[str, Rung], Any] = {}
        wanted = [getattr(torch, spec.dtype) for spec in artefact.entry.outputs]

        def graph(name: str, rung: Rung, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            if (name, rung) not in runners:
                if name not in interpreters:
                    interpreters[name] = interpreter(name)
                runners[name, rung] = interpreters[name].get_signature_runner(rung.name)
            runner = runners[name, rung]
            details = runner.get_input_details()
            given = {
                f"args_{index}": value.detach()
                .contiguous()
                .numpy()
                .astype(details[f"args_{index}"]["dtype"], copy=False)
                for index, value in enumerate(inputs)
                if f"args_{index}" in details
            }
            results = runner(**given)
            # Copied: the interpreter writes its next outputs into the same memory.
            return [torch.from_numpy(results[f"output_{i}"].copy()).to(dtype) for i, dtype in enumerate(wanted)]

        steps = [Rung.parse(key) for key in interpreters[artefact.entry.name].get_signature_list()]
        return served(artefact.entry, steps, graph)


def _with_code(text: str) -> str:
    """An error with the line of the program that it points at: its converter gives the number alone."""
    import linecache

    for file, line in dict.fromkeys(re.findall(r"(<eval_with_key>\.\d+):(\d+)", text)):
        code = linecache.getline(file, int(line)).partition(";")[0].strip()
        text = text.replace(f"{file}:{line}", f"%{code}") if code else text
    return text


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
