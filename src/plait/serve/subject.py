"""A model to be exported, as a folder that a child process reads: programs, samples and their eager outputs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from plait.errors import ServeError

if TYPE_CHECKING:
    import torch

__all__ = ["Entry", "Sample", "Subject", "TensorSpec", "misfit", "write_program"]

SUBJECT = "subject.json"
_DTYPE = re.compile(r"float(?:16|32|64)|bfloat16|float8_[a-z0-9]+|u?int(?:8|16|32|64)|bool|complex(?:32|64|128)")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of an entry point."""

    name: str
    dtype: str
    """torch's own name without the prefix: float32, int64, bool."""
    shape: tuple[int | str, ...]
    """A number where the size is fixed; a name of `Entry.dims` where it is open; "?" where it follows in another way."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Inputs and the eager outputs they give, in one safetensors file of the subject."""

    file: str
    sizes: Mapping[str, int]
    """Of the open dims, such as {"batch": 2, "length": 64}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One function of the model: `forward`, or `prefill` and `decode`."""

    name: str = "forward"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Open dimension -> (least, most) that one artefact has to serve."""
    program: str = ""
    """File of the exported program; empty in a manifest."""
    samples: tuple[Sample, ...] = ()
    """At least two batch sizes where the batch is open; the first has the sizes of the export."""
    data: tuple[Sample, ...] = ()
    """Batches of the user's data, for the accuracy of lower precisions."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, checked.

        Raises:
            ServeError: it is malformed.
        """
        try:
            return cls(
                name=_text(data["name"]),
                inputs=tuple(_spec(item) for item in data["inputs"]),
                outputs=tuple(_spec(item) for item in data["outputs"]),
                dims={_text(name): (int(low), int(high)) for name, (low, high) in data.get("dims", {}).items()},
                program=_text(data.get("program", "")),
                samples=tuple(_sample(item) for item in data.get("samples", ())),
                data=tuple(_sample(item) for item in data.get("data", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise ServeError(f"an entry point is malformed: {problem!r}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Everything that a child needs to export, check and time a model."""

    folder: Path
    name: str
    entries: Mapping[str, Entry]
    parameter_bytes: int
    """Of parameters and buffers as they are, tied ones once."""
    weights: str
    """`given`, or `random` where another seed gives other values: then parity is held on perturbed ones."""
    weights_sha256: str
    source: str
    """TARGET, run directory or class, for the manifest."""
    convolutions: bool
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """How a child rebuilds the user's own module: {"target": ..., "cwd": ...}; empty where it cannot."""
    moved: bool = False
    """Whether programs and outputs are those of moved weights."""
    closed: Mapping[str, int] = field(default_factory=dict)
    """Open dims that programs have at this size alone, for a runtime that cannot leave them open."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The subject of a folder.

        Raises:
            ServeError: it is not there or malformed.
        """
        try:
            data = json.loads((folder / SUBJECT).read_text(encoding="utf-8"))
            entries = {name: Entry.from_dict(entry) for name, entry in data.pop("entries").items()}
            return cls(folder=folder, entries=entries, **data)
        except (OSError, ValueError, TypeError, KeyError) as problem:
            raise ServeError(f"subject {folder}: {problem}") from None

    def write(self) -> None:
        """Write subject.json; programs and samples are there already."""
        data = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("folder", "moved", "closed")
        }
        data["entries"] = {name: entry.to_dict() for name, entry in self.entries.items()}
        (self.folder / SUBJECT).write_text(json.dumps(data, indent=1), encoding="utf-8")

    def program(self, entry: str = "forward") -> torch.export.ExportedProgram:
        """An entry point's exported program, loaded anew (its weights may be changed by whoever asks)."""
        import torch

        program = torch.export.load(self.folder / self.entries[entry].program)
        if self.closed:
            program = self._narrowed(program, entry)
        if self.moved:
            from plait.serve.perturb import perturb

            perturb(program.state_dict)
        return program

    def _narrowed(self, program: torch.export.ExportedProgram, entry: str) -> torch.export.ExportedProgram:
        """The same program, exported again with the closed dims at their sizes."""
        import torch
        from torch.export import Dim

        spec = self.entries[entry]
        shapes = tuple(
            {
                i: Dim.AUTO(max=spec.dims[size][1])
                for i, size in enumerate(given.shape)
                if isinstance(size, str) and size not in self.closed
            }
            or None
            for given in spec.inputs
        )
        fitting = (s for s in spec.samples if all(s.sizes.get(name) == size for name, size in self.closed.items()))
        inputs = tuple(self.inputs(next(fitting), entry))
        with torch.no_grad():
            module = program.module(check_guards=False)
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)

    def inputs(self, sample: Sample, entry: str = "forward") -> list[torch.Tensor]:
        """A sample's inputs, in order."""
        return self._tensors(sample, "in", self.entries[entry].inputs)

    def outputs(self, sample: Sample, entry: str = "forward") -> list[torch.Tensor]:
        """The eager outputs of a sample, in order."""
        return self._tensors(sample, "perturbed" if self.moved else "out", self.entries[entry].outputs)

    def _tensors(self, sample: Sample, kind: str, specs: tuple[TensorSpec, ...]) -> list[torch.Tensor]:
        from safetensors import safe_open

        with safe_open(self.folder / sample.file, framework="pt") as file:
            return [file.get_tensor(f"{kind}.{spec.name}") for spec in specs]


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Save an exported program by way of memory: torch's own writer ends the whole process where the disk is full."""
    import io

    import torch

    held = io.BytesIO()
    torch.export.save(program, held)
    path.write_bytes(held.getbuffer())


def misfit(entry: Entry, shapes: Sequence[Sequence[int]]) -> TensorSpec | None:
    """The first input whose shape is not what the entry point was exported for; None where all are."""
    sizes: dict[str, int] = {}
    for spec, shape in zip(entry.inputs, shapes, strict=True):
        if len(shape) != len(spec.shape):
            return spec
        for size, allowed in zip(shape, spec.shape, strict=True):
            low, high = entry.dims.get(allowed, (0, size)) if isinstance(allowed, str) else (allowed, allowed)
            if not low <= size <= high or (isinstance(allowed, str) and sizes.setdefault(allowed, size) != size):
                return spec
    return None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _spec(data: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(data["shape"])
    if not all(isinstance(size, str) or (isinstance(size, int) and size >= 0) for size in shape):
        raise ValueError(f"{shape} is no shape")
    dtype = _text(data["dtype"])
    if not _DTYPE.fullmatch(dtype):
        raise ValueError(f"{dtype!r} is no type of numbers")
    return TensorSpec(_text(data["name"]), dtype, shape)


def _sample(data: Mapping[str, Any]) -> Sample:
    return Sample(_text(data["file"]), {_text(name): int(size) for name, size in data["sizes"].items()})
