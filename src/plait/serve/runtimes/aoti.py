"""AOTInductor: a package of compiled code, for this kind of processor and this torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.subject import Subject

__all__ = ["Aoti"]


_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    # Inductor's tuner: for each matrix multiplication the quickest of its own C++ templates and the library's, on this machine.
    "autotune": {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"},
    # Weights become constants, laid out for the kernels that read them.
    "freezing": {"freezing": True},
}


class Aoti(Backend):
    """`<entry>.pt2`, which holds a shared library and the weights."""

    name = "aoti"
    openmp = True
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "int8", "int8-weight")

    def missing(self) -> str:
        """It compiles C++."""
        return "" if shutil.which("g++") or shutil.which("clang++") else "g++ not installed: it compiles C++ code"

    def refusal(self, subject: Subject, precision: str) -> str:
        """Int8 is another package's."""
        if precision.startswith("int8") and find_spec("torchao") is None:
            return "torchao not installed: pip install 'plait[quant]'"
        return super().refusal(subject, precision)

    def variants(self, precision: str) -> Sequence[str]:
        """Inductor's settings that pay on CPUs; the int8 weights are no constants that it could pack."""
        return () if precision.startswith("int8") else tuple(_VARIANTS)

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """One package for each entry point."""
        import torch

        from plait.serve.runtimes.casting import cast

        for name in subject.entries:
            program = subject.program(name)
            if precision.startswith("int8"):
                from plait.serve.runtimes.torchao_int8 import exported

                program = exported(program, weight_only=precision == "int8-weight")
            else:
                program = cast(program, precision)
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(folder / f"{name}.pt2"),
                inductor_configs=dict(_VARIANTS.get(self.variant, {})),
            )
        return {"note": "runs on processors with this one's instructions, with the same torch"}

    def load(self, artefact: Artefact) -> Runner:
        """The compiled function. It runs native code from the package: load only what you trust."""
        import torch

        from plait.serve.runtimes.casting import in_precision

        torch.set_num_threads(artefact.threads)
        function: Any = torch._inductor.aoti_load_package(str(artefact.folder / f"{artefact.entry.name}.pt2"))
        return in_precision(function, artefact.entry, artefact.precision)
