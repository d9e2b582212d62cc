"""A module in eval mode to an entry point: positional tensors in, a tuple of tensors out, sizes left open, samples kept.

The batch dimension is left open, and the one after it, which is the length where inputs are tokens, masks or sequences of
features; torch.export closes what the model does not allow to vary (the features of a linear layer).
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from plait.capture.trace import _explained, _masks_unread, _no_noise, call_model
from plait.errors import CaptureError
from plait.serve.runtimes.spelled import spelled
from plait.serve.subject import Entry, Sample, TensorSpec, write_program

__all__ = ["Flat", "export_entry", "write_sample"]


@dataclass
class Flat:
    """How a module's pytrees are flattened to named tensors, and back."""

    names: list[str]
    """Of the input tensors."""
    _leaves: list[Any]
    _spec: pytree.TreeSpec
    _tensor_at: list[int]
    outputs_spec: pytree.TreeSpec | None = None
    outputs_kept: list[int] | None = None
    outputs_count: int = 0
    _rebuild: Callable[[Any], Any] | None = None
    """Makes of a dict the class that the module returns."""

    @classmethod
    def of(cls, module: nn.Module, inputs: Any) -> Flat:
        """Of a module's inputs: a dict by keyword, a tuple by position, anything else as the one."""
        leaves, spec = pytree.tree_flatten(inputs)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        paths = [path for path, _ in pytree.tree_flatten_with_path(inputs)[0]]
        parameters = [p for p in inspect.signature(module.forward).parameters if p not in ("args", "kwargs")]
        names: list[str] = []
        for i in places:
            words = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in paths[i]]
            if not isinstance(inputs, dict):
                first = int(words[0]) if words and isinstance(inputs, tuple | list) else 0
                words = [parameters[first] if first < len(parameters) else f"input_{first}", *words[1:]]
            names.append(_identifier("_".join(words), names))
        return cls(names, leaves, spec, places)

    def tensors(self, inputs: Any) -> list[torch.Tensor]:
        """The tensors of inputs of this structure."""
        leaves = pytree.tree_leaves(inputs)
        return [leaves[i].detach().contiguous() for i in self._tensor_at]

    def inputs(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The module's inputs that these tensors stand for; what is no tensor is as in the sample."""
        leaves = list(self._leaves)
        for i, tensor in zip(self._tensor_at, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self._spec)

    def flatten_outputs(self, outputs: Any) -> tuple[torch.Tensor, ...]:
        """The tensors of the outputs; what is None or a number is left out."""
        outputs, self._rebuild = _as_dict(outputs)
        leaves, self.outputs_spec = pytree.tree_flatten(outputs)
        self.outputs_count = len(leaves)
        self.outputs_kept = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        return tuple(leaves[i] for i in self.outputs_kept)

    def unflatten_outputs(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The outputs as the module gives them, from the tensors of them."""
        assert self.outputs_spec is not None
        leaves: list[Any] = [None] * self.outputs_count
        for i, tensor in zip(self.outputs_kept or (), tensors, strict=True):
            leaves[i] = tensor
        found = pytree.tree_unflatten(leaves, self.outputs_spec)
        return found if self._rebuild is None else self._rebuild(found)

    def output_names(self, outputs: Any) -> list[str]:
        """A name for each tensor of the outputs: its key, or `output`."""
        outputs, _ = _as_dict(outputs)
        names: list[str] = []
        for path, leaf in pytree.tree_flatten_with_path(outputs)[0]:
            if isinstance(leaf, torch.Tensor):
                words = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
                names.append(
                    _identifier("_".join(["output", *words] if not words or words[0].isdigit() else words), names)
                )
        return names


def _as_dict(outputs: Any) -> tuple[Any, Callable[[Any], Any] | None]:
    """Outputs of a class whose tensors pytree would not find as a dict, and what makes the class of it again."""
    kind = type(outputs)
    if hasattr(outputs, "to_tuple"):  # transformers' own
        return dict(outputs), lambda values: kind(**values)
    if is_dataclass(outputs) and pytree.tree_leaves(outputs) == [outputs]:

        def rebuild(values: dict[str, Any]) -> Any:
            made = object.__new__(kind)  # its own __init__ may take other things than its fields
            for name, value in values.items():
                object.__setattr__(made, name, value)
            return made

        return {one.name: getattr(outputs, one.name) for one in fields(outputs)}, rebuild
    return outputs, None


def _identifier(text: str, taken: Sequence[str]) -> str:
    name = "".join(c if c.isalnum() or c == "_" else "_" for c in text)
    if not name.isidentifier() or keyword.iskeyword(name) or name == "self":
        name = f"x_{name}"
    number, found = 2, name
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    return found


class _Served(nn.Module):
    """The user's module with named positional tensors in and a tuple of tensors out."""

    def __init__(self, module: nn.Module, flat: Flat) -> None:
        super().__init__()
        self.model = module
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD

        def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return flat.flatten_outputs(call_model(module, flat.inputs(tensors)))

        # torch.export names the graph's inputs after the parameters it reads here.
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, positional) for n in flat.names])  # type: ignore[attr-defined]
        self.forward = forward


def export_entry(
    module: nn.Module,
    inputs: Any,
    batch_dims: Sequence[int | None],
    *,
    folder: Path,
    most: int,
    name: str = "forward",
    open_length: bool = True,
) -> tuple[Entry, Flat]:
    """An entry point without samples; its program is in `folder`. The module is in eval mode, inputs are a sample of two.

    `batch_dims` belong to the tensors of `inputs` in pytree order, `most` is the largest batch to serve.

    Raises:
        CaptureError: torch.export cannot capture the module, with the user's line.
    """
    flat = Flat.of(module, inputs)
    tensors = flat.tensors(inputs)
    served = _Served(module, flat).eval()
    with torch.no_grad():
        outputs = call_model(module, inputs)
        out_names = flat.output_names(outputs)
        out = flat.flatten_outputs(outputs)
        if not out:
            raise CaptureError(f"export: {type(module).__name__} returns no tensor", hint="return tensors from forward")
        program = _any_program(served, flat.names, tensors, batch_dims, most, open_length)
    file = f"{name}.pt2"
    write_program(program, folder / file)
    specs, out_specs, dims = _specs(program, flat.names, out_names, tensors, batch_dims, most)
    return Entry(name=name, inputs=specs, outputs=out_specs, dims=dims, program=file), flat


def _any_program(
    served: nn.Module,
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    batch_dims: Sequence[int | None],
    most: int,
    open_length: bool,
) -> torch.export.ExportedProgram:
    """With batch and length open, with batch open, with neither: the first that torch.export accepts."""
    first: Exception | None = None
    for batch, length in ((True, open_length), (True, False), (False, False)):
        shapes = {
            name: _open_dims(tensor, dim if batch else None, most, length)
            for name, tensor, dim in zip(names, tensors, batch_dims, strict=True)
        }
        try:
            with _no_noise(), _masks_unread():
                program = torch.export.export(served, tuple(tensors), dynamic_shapes=shapes, strict=False)
                if _plain_symbols(program):
                    return spelled(program)
        except Exception as problem:
            first = first or problem
    raise _explained(first or RuntimeError("no shape could be exported")) from None


def _open_dims(tensor: torch.Tensor, batch_dim: int | None, most: int, length: bool) -> dict[int, Any] | None:
    if batch_dim is None:
        return None
    found: dict[int, Any] = {batch_dim: Dim.AUTO(max=most)}
    after = batch_dim + 1
    may_be_length = not tensor.is_floating_point() or tensor.dim() <= 3  # of images, dimension 1 holds the channels
    if length and may_be_length and after < tensor.dim() and tensor.shape[after] > 2:
        found[after] = Dim.AUTO(max=tensor.shape[after])
    return found


def _plain_symbols(program: torch.export.ExportedProgram) -> bool:
    """Whether every open size is a symbol by itself; 8*s would need a rule of its own."""
    symbols = [_symbol(size) for value in _values(program) for size in value.shape]
    return all(symbol.is_Symbol for symbol in symbols if symbol is not None)


def _symbol(size: Any) -> Any:
    """The expression of an open size; None where it is a number."""
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _values(program: torch.export.ExportedProgram) -> list[torch.Tensor]:
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[name].meta["val"] for name in program.graph_signature.user_inputs if isinstance(name, str)]


def _specs(
    program: torch.export.ExportedProgram,
    names: Sequence[str],
    out_names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    batch_dims: Sequence[int | None],
    most: int,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], dict[str, tuple[int, int]]]:
    named: dict[Any, str] = {}
    dims: dict[str, tuple[int, int]] = {}
    specs = []
    for name, value, tensor, batch_dim in zip(names, _values(program), tensors, batch_dims, strict=True):
        shape: list[int | str] = []
        for i, size in enumerate(value.shape):
            symbol = _symbol(size)
            if symbol is None:
                shape.append(int(size))
                continue
            if symbol not in named:
                is_batch = i == batch_dim
                number = sum(name.startswith("length") for name in dims)
                # All inputs have one batch, though export may give a mask, which broadcasts, a symbol of its own.
                name_of_size = "batch" if is_batch else f"length{number + 1}" if number else "length"
                named[symbol] = name_of_size
                allowed = program.range_constraints[symbol]
                # torch starts at two because one is special to it; one is checked by running it.
                low = int(allowed.lower) if allowed.lower > 2 else 1
                limit = most if is_batch else tensor.shape[i]
                high = min(limit, int(allowed.upper) if allowed.upper < 2**31 else limit)
                known = dims.get(name_of_size, (low, high))
                dims[name_of_size] = (max(low, known[0]), min(high, known[1]))
            shape.append(named[symbol])
        specs.append(TensorSpec(name, _dtype(value), tuple(shape)))
    found: Any = program.graph.output_node().args[0]
    values = [node.meta["val"] for node in found]
    out_specs = [
        TensorSpec(name, _dtype(value), tuple(_size(size, named) for size in value.shape))
        for name, value in zip(out_names, values[-len(out_names) :], strict=True)
    ]
    return tuple(specs), tuple(out_specs), dims


def _size(size: Any, named: Mapping[Any, str]) -> int | str:
    symbol = _symbol(size)
    return int(size) if symbol is None else named.get(symbol, "?")


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def write_sample(
    entry: Entry,
    folder: Path,
    file: str,
    tensors: Sequence[torch.Tensor],
    runs: Mapping[str, Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]],
) -> Sample:
    """Inputs and what each of `runs` (`out`, `perturbed`) gives for them, in one file."""
    held = {f"in.{spec.name}": tensor.clone() for spec, tensor in zip(entry.inputs, tensors, strict=True)}
    for kind, run in runs.items():
        with torch.no_grad():
            given = run(tensors)
        held.update(
            {f"{kind}.{s.name}": t.detach().contiguous().clone() for s, t in zip(entry.outputs, given, strict=True)}
        )
    (folder / file).write_bytes(save(held))
    sizes = {
        size: tensor.shape[i]
        for spec, tensor in zip(entry.inputs, tensors, strict=True)
        for i, size in enumerate(spec.shape)
        if isinstance(size, str)
    }
    return Sample(file, sizes)


def with_samples(entry: Entry, samples: Sequence[Sample], data: Sequence[Sample] = ()) -> Entry:
    """The entry point with its samples."""
    return replace(entry, samples=tuple(samples), data=tuple(data))
