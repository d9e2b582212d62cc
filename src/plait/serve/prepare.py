"""A source to a subject's folder: exported program, samples at several sizes, batches of the user's data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait.capture import batch as batches
from plait.capture.trace import call_model
from plait.errors import CheckpointError
from plait.serve.entry import Flat, export_entry, write_sample
from plait.serve.perturb import perturb
from plait.serve.runtimes.huggingface import keep_config
from plait.serve.source import Source, eval_mode
from plait.serve.subject import Entry, Sample, Subject, misfit

__all__ = ["Prepared", "outputs_moved", "prepare"]


class Prepared:
    """A subject, and what only this process knows of it."""

    def __init__(self, subject: Subject, flat: Flat, data: list[tuple[Any, Any]]) -> None:
        self.subject = subject
        self.flat = flat
        self.data = data
        """The user's batches behind `Entry.data`, in the same order, with their targets."""


def prepare(
    source: Source, folder: Path, *, asked: Sequence[int], data: Sequence[tuple[Any, Any]], tell: Callable[[str], None]
) -> Prepared:
    """Write the subject of `source` for the asked batch sizes into `folder`, and read its forward.

    Raises:
        CaptureError: torch.export cannot capture the model; the message has the user's line.
    """
    with eval_mode(source.module):
        tell("capturing the model")
        most = max(2, *asked)
        job = source.serving_job
        first = batches.resized(job, 2)[0]
        dims = _batch_dims(job)
        entry, flat = export_entry(source.module, first, dims, folder=folder, most=most)
        if "batch" not in entry.dims and asked[0] != 2:
            # Fixed sizes: then those that were asked for first.
            first = batches.resized(job, asked[0])[0]
            entry, flat = export_entry(source.module, first, dims, folder=folder, most=most)
        tell("running eager")
        run = _runner(source.module, flat)
        samples = _samples(source, entry, flat, asked, folder, run)
        kept = [batch for batch in data if _fits(entry, flat, source, batch)]
        held = [
            write_sample(
                entry, folder, f"forward-data-{i}.safetensors", flat.tensors(source.served(batch)), {"out": run}
            )
            for i, batch in enumerate(kept)
        ]
        entry = replace(entry, samples=tuple(samples), data=tuple(held))
    subject = Subject(
        folder=folder,
        name=source.name,
        entries={"forward": entry},
        parameter_bytes=_bytes(source.module),
        weights="random" if source.random else "given",
        weights_sha256=_sha256(source.module),
        source=source.text,
        convolutions=any(isinstance(part, nn.modules.conv._ConvNd) for part in source.module.modules()),
        recipe={**source.recipe, "label": source.label, "shifts": source.shifts} if source.recipe else {},
    )
    _refuse_unfilled(source, subject)
    keep_config(source, folder)
    subject.write()
    return Prepared(subject, flat, kept)


def _batch_dims(job: Any) -> list[int | None]:
    """Batch dimension of every tensor of the job's inputs."""
    leaves = torch.utils._pytree.tree_leaves(job.batch)
    return [d for leaf, d in zip(leaves, batches.dims_of(job), strict=True) if isinstance(leaf, torch.Tensor)]


def _runner(module: nn.Module, flat: Flat) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    return lambda tensors: flat.flatten_outputs(call_model(module, flat.inputs(tensors)))


def _samples(source: Source, entry: Entry, flat: Flat, asked: Sequence[int], folder: Path, run: Any) -> list[Sample]:
    """At the exported sizes, at one, at every asked batch, and at two thirds of the length where that is open."""
    job = source.serving_job
    if "batch" in entry.dims:
        low, high = entry.dims["batch"]
        sizes = [b for b in dict.fromkeys((2, 1, *asked)) if low <= b <= high]
    else:
        sizes = [batches.batch_size(job) if not asked else (2 if _exported_two(entry, flat, job) else asked[0])]
    wanted = [flat.tensors(batches.resized(job, size)[0]) for size in sizes]
    lengths = {name: limits for name, limits in entry.dims.items() if name != "batch"}
    if lengths:
        wanted.append(_shorter(entry, wanted[0], lengths))
    files = [f"{entry.name}-{i}.safetensors" for i in range(len(wanted))]
    if not source.random:
        return [write_sample(entry, folder, f, t, {"out": run}) for f, t in zip(files, wanted, strict=True)]
    moved = outputs_moved(source.module, run, wanted)
    return [
        write_sample(entry, folder, file, tensors, {"out": run, "perturbed": partial(_given, given)})
        for file, tensors, given in zip(files, wanted, moved, strict=True)
    ]


def _given(outputs: Sequence[torch.Tensor], _inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return outputs


def _exported_two(entry: Entry, flat: Flat, job: Any) -> bool:
    shapes = [tuple(t.shape) for t in flat.tensors(batches.resized(job, 2)[0])]
    return shapes == [spec.shape for spec in entry.inputs]


def _shorter(entry: Entry, tensors: Sequence[torch.Tensor], lengths: dict[str, tuple[int, int]]) -> list[torch.Tensor]:
    found = []
    for spec, tensor in zip(entry.inputs, tensors, strict=True):
        part = tensor
        for i, size in enumerate(spec.shape):
            if size in lengths:
                part = part.narrow(i, 0, max(lengths[str(size)][0], tensor.shape[i] * 2 // 3))
        found.append(part.contiguous())
    return found


def outputs_moved(module: nn.Module, run: Any, wanted: Sequence[Any]) -> list[Any]:
    """Outputs of the module with moved weights, which it has for the time of this alone."""
    # By the names in the exported program, which wraps the module as `model`.
    state = {f"model.{name}": value for name, value in module.state_dict().items()}
    before = {name: value.detach().clone() for name, value in state.items()}
    perturb(state)
    try:
        return [[t.clone() for t in run(tensors)] for tensors in wanted]
    finally:
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(before[name])


def _fits(entry: Entry, flat: Flat, source: Source, batch: tuple[Any, Any]) -> bool:
    """Whether a batch of the user's data has sizes that the artefact is to serve."""
    try:
        tensors = flat.tensors(source.served(batch))
    except (IndexError, KeyError, AttributeError):
        return False
    return misfit(entry, [tensor.shape for tensor in tensors]) is None


def _bytes(module: nn.Module) -> int:
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.parameters()}
    return sum(tensors.values())


def _sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _refuse_unfilled(source: Source, subject: Subject) -> None:
    """A parameter that the checkpoint does not hold may be missing only where nothing uses it."""
    if not source.not_in_checkpoint:
        return
    program = subject.program()
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for node, name in program.graph_signature.inputs_to_parameters.items():
        plain = name.removeprefix("model.")
        if plain in source.not_in_checkpoint and nodes[node].users:
            raise CheckpointError(
                f"export {source.text}: the checkpoint is of another model: it has no {plain}",
                hint="give the TARGET, with its arguments, that was trained",
            )
