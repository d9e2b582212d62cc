"""An artefact, loaded: a callable that takes torch tensors or numpy arrays and refuses what it was not exported for.

served = plait.serve.load("exports/gpt/onnxruntime", threads=2)
logits = served(tokens)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import PlaitError, ServeError
from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.manifest import Manifest
from plait.serve.subject import Entry, TensorSpec, misfit

if TYPE_CHECKING:
    import torch

__all__ = ["Function", "Served", "checked", "load"]


def load(
    folder: str | os.PathLike[str], *, threads: int | None = None, knobs: Mapping[str, Any] | None = None
) -> Served:
    """The artefact in a folder, ready to run on this machine's CPU.

    `threads`: None: as many as `plait.hardware.placement` chooses for a process that may use these cores (by the measurement of
    `plait hardware probe` where one is kept; OMP_NUM_THREADS wins). `Served.threads` and `Served.reason` say which and why. Cores
    are left alone: the start file beside an export keeps a server to its own.

    Raises:
        ServeError: it is no artefact, was changed, points outside of its folder, its runtime is not installed, or it was only
            prepared for a platform that is not here.
    """
    place = Path(folder)
    manifest = Manifest.read(place)
    from plait.serve.registry import backend_at, backends

    known = backends()
    if manifest.backend not in known:
        raise ServeError(f"{place}: its backend {manifest.backend!r} is not installed here")
    backend = backend_at(known[manifest.backend])
    missing = backend.missing()
    if missing:
        raise ServeError(f"{place}: {missing}")
    if backend.status == "prepared":
        raise ServeError(f"{place}: {backend.name} artefacts are prepared only; they run where {backend.name} is")
    reason = f"{threads} asked for"
    if threads is None:
        from plait.hardware.placement import place_here

        chosen = place_here()
        threads, reason = chosen.threads, chosen.reason
    elif threads < 1:
        raise ServeError(
            f"{place}: threads={threads} is not a number of threads", hint="give 1 or more, or leave it away"
        )
    return Served(place, manifest, backend, threads, knobs, reason)


class Served:
    """A loaded artefact. Calling it runs `forward`, or its only entry point; others are `served.entry(name)`."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        backend: Backend,
        threads: int,
        knobs: Mapping[str, Any] | None,
        reason: str = "",
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.threads, self.reason = threads, reason
        self._backend, self._knobs = backend, knobs
        self._functions: dict[str, Function] = {}

    def entry(self, name: str) -> Function:
        """One entry point.

        Raises:
            ServeError: there is none of that name.
        """
        if name not in self.manifest.entries:
            raise ServeError(
                f"{self.folder}: no entry point {name!r}", hint=f"it has {', '.join(self.manifest.entries)}"
            )
        if name not in self._functions:
            artefact = Artefact(
                folder=self.folder,
                entry=self.manifest.entries[name],
                precision=self.manifest.precision,
                threads=self.threads,
                facts=self.manifest.facts,
                knobs=self._knobs,
            )
            with _said(f"{self.folder}: {self.manifest.backend} cannot load {name}"):
                run = self._backend.load(artefact)
            self._functions[name] = Function(artefact.entry, run, str(self.folder))
        return self._functions[name]

    def generate(self, tokens: torch.Tensor, *, max_new_tokens: int = 64, stop: int | None = None) -> torch.Tensor:
        """The prompt `tokens` [batch, length] and the most likely tokens after it (`plait.serve.decoding.generate`)."""
        from plait.serve.decoding.generate import generate

        return generate(self, tokens, max_new_tokens=max_new_tokens, stop=stop)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """What the entry point gives; see `Function`."""
        entries = self.manifest.entries
        return self.entry("forward" if "forward" in entries else next(iter(entries)))(*inputs, **named)


@contextmanager
def _said(what: str) -> Iterator[None]:
    """A runtime's own error, which may be of any kind, as one of plait's, with the other as its cause."""
    try:
        yield
    except PlaitError:
        raise
    except Exception as problem:
        text = " ".join(str(problem).split())[:300]
        raise ServeError(
            f"{what}: {type(problem).__name__}: {text}",
            hint="if the files come from another release of the runtime, or were changed, export again",
        ) from problem


class Function:
    """One entry point of a loaded artefact."""

    def __init__(self, entry: Entry, run: Runner, where: str) -> None:
        self.spec = entry
        self._run = run
        self._where = where

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The output, or a dict of them by name where there are several; numpy arrays where numpy arrays came in.

        Raises:
            ServeError: an input is missing, or has another type or a size outside of what was exported.
        """
        import numpy as np
        import torch

        given = self._bind(inputs, named)
        is_numpy = all(isinstance(value, np.ndarray) for value in given)
        tensors = [torch.from_numpy(np.ascontiguousarray(v)) if isinstance(v, np.ndarray) else v for v in given]
        tensors = checked(self.spec, tensors, self._where)
        with _said(f"{self._where}: {self.spec.name} failed when it ran"):
            outputs = self._run(tensors)
        if len(outputs) != len(self.spec.outputs):
            raise ServeError(f"{self._where}: {len(outputs)} outputs, {len(self.spec.outputs)} are in its manifest")
        values = [t.numpy() if is_numpy else t for t in outputs]
        if len(values) == 1:
            return values[0]
        return {spec.name: value for spec, value in zip(self.spec.outputs, values, strict=True)}

    def _bind(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        names = [spec.name for spec in self.spec.inputs]
        if len(inputs) > len(names):
            raise ServeError(f"{self._where}: {len(inputs)} inputs given, it takes {len(names)}: {', '.join(names)}")
        values = {**dict(zip(names, inputs, strict=False)), **named}
        wrong = [name for name in named if name not in names or name in names[: len(inputs)]]
        missing = [name for name in names if name not in values]
        if wrong or missing:
            what = f"no input {wrong[0]!r} to give" if wrong else f"input {missing[0]!r} is missing"
            raise ServeError(f"{self._where}: {what}", hint=f"it takes {', '.join(names)}")
        return [values[name] for name in names]


def checked(entry: Entry, tensors: list[torch.Tensor], where: str) -> list[torch.Tensor]:
    """The tensors, contiguous, if they are what the entry point was exported for.

    Raises:
        ServeError: with the input, what it is and what it may be.
    """
    import torch

    for spec, tensor in zip(entry.inputs, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise ServeError(f"{where}: {spec.name} is a {type(tensor).__name__}, not a tensor or an array")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != spec.dtype:
            raise ServeError(f"{where}: {spec.name} is {dtype}, it takes {spec.dtype}")
    wrong = misfit(entry, [tensor.shape for tensor in tensors])
    if wrong is not None:
        shape = tuple(tensors[entry.inputs.index(wrong)].shape)
        raise ServeError(
            f"{where}: {wrong.name} has shape {shape}, it was exported for {describe(wrong, entry)}",
            hint="give inputs of that shape, or export again with the sizes you need (--batch, a longer sample)",
        )
    return [tensor.detach().cpu().contiguous() for tensor in tensors]


def describe(spec: TensorSpec, entry: Entry) -> str:
    """`[batch, 64] with batch 1 to 8`."""
    names = [size for size in spec.shape if isinstance(size, str) and size in entry.dims]
    limits = ", ".join(f"{name} {entry.dims[name][0]} to {entry.dims[name][1]}" for name in dict.fromkeys(names))
    return f"[{', '.join(map(str, spec.shape))}]" + (f" with {limits}" if limits else "")
