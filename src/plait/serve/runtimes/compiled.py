"""torch.compile, as a row to compare with: nothing is exported."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.subject import Subject

__all__ = ["Compiled"]


class Compiled(Backend):
    """The user's module compiled in the process that serves it; int8 by torchao."""

    name = "compile"
    openmp = True
    keeps = False
    distributions = ("torchao",)
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "int8", "int8-weight")

    def missing(self) -> str:
        """It compiles C++."""
        return "" if shutil.which("g++") or shutil.which("clang++") else "g++ not installed: it compiles C++ code"

    def refusal(self, subject: Subject, precision: str) -> str:
        """Int8 is another package's."""
        import importlib.util

        if precision.startswith("int8") and importlib.util.find_spec("torchao") is None:
            return "torchao not installed: pip install 'plait[quant]'"
        return super().refusal(subject, precision)

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """Nothing is written."""
        return {"note": "compiled where it is served; nothing is exported"}

    def load(self, artefact: Artefact) -> Runner:
        """The compiled function."""
        import torch

        from plait.serve.baseline import compiled, eager
        from plait.serve.runtimes.casting import cast, in_precision

        assert artefact.subject is not None
        torch.set_num_threads(artefact.threads)
        if artefact.precision == "fp32":
            return compiled(eager(artefact.subject, artefact.entry.name)[0])
        program = artefact.subject.program(artefact.entry.name)
        if artefact.precision.startswith("int8"):
            from plait.serve.runtimes.torchao_int8 import quantised

            module = quantised(program, weight_only=artefact.precision == "int8-weight")
        else:
            module = cast(program, artefact.precision).module(check_guards=False)
        return in_precision(compiled(module), artefact.entry, artefact.precision)
