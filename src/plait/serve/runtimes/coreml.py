"""Core ML: prepared. The package is converted and read back on any system; it runs on Apple's alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.subject import Subject

__all__ = ["CoreMl"]


class CoreMl(Backend):
    """`<entry>.mlpackage`."""

    name = "coreml"
    imports = ("coremltools",)
    distributions = ("coremltools",)
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    status: ClassVar[Literal["run", "prepared"]] = "prepared"

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """One package for each entry point, read back: inputs and outputs have to be the program's."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools

            kind = coremltools.precision.FLOAT32 if precision == "fp32" else coremltools.precision.FLOAT16
            for name, entry in subject.entries.items():
                program = subject.program(name).run_decompositions({})
                model = coremltools.convert(
                    program,
                    convert_to="mlprogram",
                    compute_precision=kind,
                    minimum_deployment_target=coremltools.target.iOS18,
                    skip_model_load=True,
                )
                path = folder / f"{name}.mlpackage"
                model.save(str(path))
                back = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().description
                found = [value.name for value in back.input]
                if len(found) != len(entry.inputs) or len(back.output) != len(entry.outputs):
                    raise ValueError(f"the package has inputs {found} and {len(back.output)} outputs")
        return {"note": "prepared, never run here: converted and read back; it runs on macOS and iOS"}

    def load(self, artefact: Artefact) -> Runner:
        """Nothing to run here."""
        raise NotImplementedError("Core ML packages run on Apple's systems only")
