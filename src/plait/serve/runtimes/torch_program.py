"""torch itself: the weights as safetensors, and the exported program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from plait.errors import ServeError
from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.subject import Subject, write_program

if TYPE_CHECKING:
    import torch

__all__ = ["TorchProgram"]

WEIGHTS = "model.safetensors"


class TorchProgram(Backend):
    """`model.safetensors` under the user's own names, and a program for each entry point.

    A program that is alone also holds the weights, so that torch.export.load is enough for it. Several hold none: their weights are on
    the meta device until `load` takes them from model.safetensors, which maps one file into memory for all of them.
    """

    name = "torch"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """One `<entry>.pt2` each and, beside them, the weights alone."""
        import torch
        from safetensors.torch import save_model

        from plait.serve.decoding.cache_update import scattered
        from plait.serve.runtimes.casting import cast

        held: dict[str, torch.Tensor] = {}
        for name in subject.entries:
            program = scattered(cast(subject.program(name), precision))
            held = held or {key: _whole(tensor.detach()) for key, tensor in program.state_dict.items()}
            if len(subject.entries) > 1:
                _empty(program, held)
            write_program(program, folder / f"{name}.pt2")
        holder = torch.nn.Module()
        for name, tensor in held.items():
            _put(holder, _own_name(name), tensor)
        save_model(holder, str(folder / WEIGHTS), metadata={"format": "pt"})
        return {}

    def load(self, artefact: Artefact) -> Runner:
        """The program as a module.

        Raises:
            ServeError: its weights are not in the file beside it.
        """
        import torch

        from plait.serve.runtimes.casting import in_precision

        torch.set_num_threads(artefact.threads)
        program = torch.export.load(artefact.folder / f"{artefact.entry.name}.pt2")
        _fill(program, artefact.folder / WEIGHTS)
        # The manifest refuses other shapes; torch's own guards would refuse one sample, which was checked.
        module: Any = program.module(check_guards=False)
        return in_precision(module, artefact.entry, artefact.precision)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; a copy where it is a part of a larger memory (a window made by cutting off its end), which no file takes."""
    used = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == used else tensor.clone()


def _own_name(name: str) -> str:
    """A tensor's name in the user's module, which the programs wrap as `model`."""
    return name.removeprefix("model.")


def _empty(program: torch.export.ExportedProgram, held: Mapping[str, torch.Tensor]) -> None:
    """Take the tensors that are held elsewhere out of a program."""
    import torch

    for name, tensor in program.state_dict.items():
        other = held.get(name)
        if other is not None and other.dtype == tensor.dtype and torch.equal(other, tensor):
            _set(program, name, tensor.detach().to("meta"))


def _fill(program: torch.export.ExportedProgram, path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    wanted = {name: tensor for name, tensor in program.state_dict.items() if tensor.is_meta}
    if not wanted:
        return
    try:
        with safe_open(path, framework="pt") as file:
            kept_as = file.metadata() or {}  # of tensors that share memory one is kept; the rest point at it
            for name, empty in wanted.items():
                own = _own_name(name)
                tensor = file.get_tensor(kept_as.get(own, own))
                if tensor.shape != empty.shape or tensor.dtype != empty.dtype:
                    raise ServeError(
                        f"{path}: {own} is {tensor.dtype} {list(tensor.shape)}, the program takes {empty.dtype} "
                        f"{list(empty.shape)}"
                    )
                _set(program, name, tensor)
    except (OSError, SafetensorError) as problem:
        raise ServeError(f"{path}: the program's weights are not in it: {problem}") from None


def _set(program: torch.export.ExportedProgram, name: str, tensor: torch.Tensor) -> None:
    import torch

    is_parameter = isinstance(program.state_dict[name], torch.nn.Parameter)
    program.state_dict[name] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _put(holder: Any, name: str, tensor: Any) -> None:
    import torch

    *path, last = name.split(".")
    for part in path:
        if part not in holder._modules:
            holder.add_module(part, torch.nn.Module())
        holder = holder._modules[part]
    holder.register_buffer(last, tensor)
