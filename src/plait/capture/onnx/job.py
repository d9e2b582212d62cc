"""`onnx:FILE.onnx?...` as a Job: the graph as a module, a random batch of the right shape, a loss that fits its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from plait.capture.arguments import convert, nearest
from plait.capture.job import Job
from plait.capture.onnx.graph import GraphInput, OnnxFile, every
from plait.capture.onnx.module import OnnxModule
from plait.capture.onnx.read import read_onnx
from plait.capture.onnx.values import dtype_of
from plait.capture.onnx.weights import find_roles
from plait.errors import TargetError

__all__ = ["LOSSES", "OnnxLoss", "from_onnx", "onnx_job"]

_SAMPLES = 4  # of a batch whose size the file leaves open
_LENGTH = 32  # of every other open dimension
LOSSES = ("cross_entropy", "nll", "binary_cross_entropy", "mse", "l1", "output")

_OWN = {"samples": int, "loss": str, "output": str, "lr": float, "batch_dim": int, "train": list, "fixed": list}


def from_onnx(path: Path | str, *, train: Sequence[str] = (), fixed: Sequence[str] = ()) -> OnnxModule:
    """The file's graph as a torch module that trains, in training mode.

    Which constants become parameters is said in `plait.capture.onnx.weights`; `train` and `fixed` are patterns of names
    in the file that say otherwise.

    Raises:
        TargetError: the file is broken, hostile, newer than plait knows, or has an operator that plait does not import.
    """
    return _module(read_onnx(path), train, fixed)


def _module(file: OnnxFile, train: Sequence[str], fixed: Sequence[str]) -> OnnxModule:
    module = OnnxModule(file, find_roles(file, train=train, fixed=fixed))
    module.train()
    return module


@dataclass(frozen=True, slots=True)
class OnnxLoss:
    """loss(outputs, targets) of one of a graph's outputs, a mean over samples."""

    kind: str
    """One of LOSSES. `nll` takes probabilities (a graph that ends in a softmax)."""
    index: int = 0
    """Of the output."""

    def __call__(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        """A scalar."""
        out: torch.Tensor = outputs[self.index] if isinstance(outputs, tuple | list) else outputs
        match self.kind:
            case "cross_entropy":
                return F.cross_entropy(out.flatten(0, -2), targets.flatten())
            case "nll":
                return F.nll_loss(torch.log(out.clamp(min=1e-7)).flatten(0, -2), targets.flatten())
            case "binary_cross_entropy":
                return F.binary_cross_entropy(out.clamp(1e-7, 1 - 1e-7), targets)
            case "l1":
                return F.l1_loss(out, targets)
            case "output":
                return out.mean()
            case _:
                return F.mse_loss(out, targets)


def onnx_job(name: str, arguments: Mapping[str, str]) -> Job:
    """The Job of `onnx:NAME?...`.

    Arguments: `samples`, `loss` (one of LOSSES), `output` (its name), `lr`, `batch_dim`, `train` and `fixed` (patterns of
    names), and for every open dimension of the file its name and size (`sequence_length=64`).

    Raises:
        TargetError: as `from_onnx`; an unknown argument; or the graph does not run on a batch of these shapes.
    """
    file = read_onnx(name)
    where = f"target onnx:{name}"
    own = {key: convert(arguments[key], kind, f"{where}: {key}") for key, kind in _OWN.items() if key in arguments}
    batch_dim = own.get("batch_dim", 0)
    sizes = _sizes(file, {k: v for k, v in arguments.items() if k not in _OWN}, own.get("samples"), batch_dim, where)
    module = _module(file, own.get("train", ()), own.get("fixed", ()))
    if not any(True for _ in module.parameters()):
        raise TargetError(f"{where}: the graph has no weights to train", hint="name them: ?train=PATTERN")
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(_random(file, value, sizes, generator) for value in file.inputs)
    outputs = _trial(module, inputs, where)
    index = _output(file, own.get("output"), outputs, where)
    kind = own.get("loss") or _usual_loss(file, index, outputs[index])
    if kind not in LOSSES:
        raise TargetError(f"{where}: loss={kind} is unknown{nearest(kind, LOSSES)}", hint=f"one of {', '.join(LOSSES)}")
    lr = own.get("lr", 1e-3)
    return Job(
        module,
        batch=(inputs if len(inputs) > 1 else inputs[0], _targets(kind, outputs[index], inputs, batch_dim, generator)),
        loss=OnnxLoss(kind, index),
        optimizer=lambda named: torch.optim.AdamW(named, lr),
        batch_dim=batch_dim
        if batch_dim == 0 or len(inputs) == 1
        else dict.fromkeys(map(str, range(len(inputs))), batch_dim),
        name=Path(name).stem,
    )


def _sizes(file: OnnxFile, given: Mapping[str, str], samples: int | None, batch_dim: int, where: str) -> dict[str, int]:
    """Size of every open dimension by its name."""
    if not file.inputs:
        raise TargetError(f"{where}: the graph has no input")
    open_dims = {dim: axis for value in file.inputs for axis, dim in enumerate(value.shape) if isinstance(dim, str)}
    unknown = next((key for key in given if key not in open_dims), None)
    if unknown is not None:
        known = [*_OWN, *open_dims]
        raise TargetError(
            f"{where}: no argument {unknown!r}{nearest(unknown, known)}", hint=f"it takes {', '.join(known)}"
        )
    sizes = {dim: convert(given[dim], int, f"{where}: {dim}") if dim in given else _LENGTH for dim in open_dims}
    fixed = set()
    for value in file.inputs:
        if len(value.shape) <= batch_dim:
            continue
        first = value.shape[batch_dim]
        if isinstance(first, str):
            if first not in given:
                sizes[first] = samples or _SAMPLES
        else:
            fixed.add(first)
    if samples is not None and fixed and samples not in fixed:
        raise TargetError(
            f"{where}: samples={samples}, but the file fixes the batch at {min(fixed)}",
            hint="export it with an open batch dimension (torch.onnx.export(..., dynamic_shapes=...))",
        )
    if any(size < 1 for size in sizes.values()):
        raise TargetError(f"{where}: every size must be at least 1")
    return sizes


def _random(file: OnnxFile, value: GraphInput, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in value.shape]
    try:
        dtype = dtype_of(np.empty(0, value.dtype))
    except TypeError as problem:
        raise TargetError(f"{file.path}: input {value.name!r}: {problem}") from None
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    rows = _rows(file, value.name)
    if dtype == torch.bool or rows is None:  # a mask, a length, a type: one is in every range
        return torch.ones(shape, dtype=dtype)
    return torch.randint(rows, shape, generator=generator).to(dtype)


def _rows(file: OnnxFile, name: str) -> int | None:
    """Rows of the smallest table in which this input looks up; None where it looks up in none."""
    same = {name}
    found = []
    for node in every(file.nodes):
        if node.op in ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten") and node.inputs[0] in same:
            same.update(node.outputs)
        elif node.op == "Gather" and node.inputs[1] in same and node.inputs[0] in file.constants:
            table = file.constants[node.inputs[0]]
            if table.ndim >= 2:
                found.append(int(table.shape[node.attributes.get("axis", 0)]))
    return min(found) if found else None


def _trial(module: OnnxModule, inputs: tuple[torch.Tensor, ...], where: str) -> tuple[torch.Tensor, ...]:
    """One run without training, so that what is wrong is said now and with the node's name."""
    module.eval()
    try:
        with torch.no_grad():
            outputs = module(*inputs)
    except Exception as problem:
        node = next(iter(getattr(problem, "__notes__", [])), "in the graph")
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
        shapes = ", ".join(f"{n} {list(x.shape)}" for n, x in zip(module.input_names, inputs, strict=True))
        raise TargetError(
            f"{where}: {node}: {reason}\n\n  with {shapes}", hint="give open sizes by name, such as ?length=64"
        ) from None
    finally:
        module.train()
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _output(file: OnnxFile, name: str | None, outputs: tuple[torch.Tensor, ...], where: str) -> int:
    if name is not None:
        if name not in file.outputs:
            raise TargetError(f"{where}: no output {name!r}{nearest(name, file.outputs)}")
        return file.outputs.index(name)
    found = next((i for i, out in enumerate(outputs) if out.is_floating_point() and out.numel()), None)
    if found is None:
        raise TargetError(f"{where}: no output is of floating type, so that there is nothing to train on")
    return found


def _usual_loss(file: OnnxFile, index: int, output: torch.Tensor) -> str:
    maker = next((node for node in reversed(file.nodes) if file.outputs[index] in node.outputs), None)
    last = maker.op if maker is not None else ""
    tokens = any(np.issubdtype(value.dtype, np.integer) and len(value.shape) == 2 for value in file.inputs)
    if output.numel() == 1 and output.dim() == 0:
        return "output"
    if last == "Sigmoid":
        return "binary_cross_entropy"
    if output.dim() == 2 or (output.dim() == 3 and tokens):
        return "mse" if output.shape[-1] == 1 else "nll" if last == "Softmax" else "cross_entropy"
    return "mse"


def _targets(
    kind: str, output: torch.Tensor, inputs: tuple[torch.Tensor, ...], batch_dim: int, generator: torch.Generator
) -> torch.Tensor:
    if kind in ("cross_entropy", "nll"):
        return torch.randint(output.shape[-1], output.shape[:-1], generator=generator)
    if kind == "binary_cross_entropy":
        return torch.randint(2, output.shape, generator=generator).to(output.dtype)
    if kind == "output":
        return torch.zeros(inputs[0].shape[batch_dim])
    return torch.randn(output.shape, generator=generator).to(output.dtype)
