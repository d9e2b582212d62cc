"""torch itself: the weights as safetensors, and the exported program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.subject import Subject, write_program

__all__ = ["TorchProgram"]


class TorchProgram(Backend):
    """`model.safetensors` under the user's own names, and a program for each entry point."""

    name = "torch"
    openmp = True
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """One `<entry>.pt2` each and, beside them, the weights alone."""
        import torch
        from safetensors.torch import save_model

        from plait.serve.casting import cast

        for name in subject.entries:
            program = cast(subject.program(name), precision)
            write_program(program, folder / f"{name}.pt2")
        holder = torch.nn.Module()
        for name, tensor in program.state_dict.items():
            _put(holder, name.removeprefix("model."), tensor.detach())
        save_model(holder, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return {}

    def load(self, artefact: Artefact) -> Runner:
        """The program as a module."""
        import torch

        from plait.serve.casting import in_precision

        torch.set_num_threads(artefact.threads)
        # The manifest refuses other shapes; torch's own guards would refuse one sample, which was checked.
        module: Any = torch.export.load(artefact.folder / f"{artefact.entry.name}.pt2").module(check_guards=False)
        return in_precision(module, artefact.entry, artefact.precision)


def _put(holder: Any, name: str, tensor: Any) -> None:
    import torch

    *path, last = name.split(".")
    for part in path:
        if part not in holder._modules:
            holder.add_module(part, torch.nn.Module())
        holder = holder._modules[part]
    holder.register_buffer(last, tensor)
