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
from plait.capture.job import Job
from plait.capture.trace import call_model, in_short
from plait.errors import CaptureError, CheckpointError, TargetError
from plait.serve.entry import Flat, export_entry, write_sample
from plait.serve.perturb import perturb
from plait.serve.runtimes.huggingface import keep_config
from plait.serve.source import Source, eval_mode
from plait.serve.subject import Entry, Sample, Subject, misfit

__all__ = ["Prepared", "outputs_moved", "prepare"]

Run = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
_LEAST_TRIED = 8  # lengths from the least that torch.export allows, for the least that eager runs


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
        entry, flat, samples, run = _exported(source, folder, asked, tell)
        kept = [found for batch in data if (found := _fitting(entry, flat, source, batch)) is not None]
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


def _exported(
    source: Source, folder: Path, asked: Sequence[int], tell: Callable[[str], None]
) -> tuple[Entry, Flat, list[Sample], Run]:
    """The forward with as much left open as eager itself takes, and its samples.

    What torch.export leaves open is not always what the model can do: a length may have to be even, or fit a parameter.
    """
    job = source.serving_job
    own = batches.batch_size(job) if _has_batch(job) else 0
    # Exported at batch 2; where that leaves nothing open, at the size that was asked for first, or the model's only one.
    sizes = dict.fromkeys((2, asked[0], own)) if own else {0: None}
    first: CaptureError | None = None
    for size in sizes:
        inputs = _resized(job, size)
        for is_open, open_length in ((True, True), (True, False), (False, False)) if size == 2 else ((False, False),):
            tell("capturing the model")
            try:
                _tried(source.module, inputs, size)
                dims = _batch_dims(job) if is_open else [None] * len(_batch_dims(job))
                entry, flat = export_entry(
                    source.module, inputs, dims, folder=folder, most=max(2, *asked), open_length=open_length
                )
                if size == 2 and "batch" not in entry.dims and asked[0] != 2:
                    break
                tell("running eager")
                run = _runner(source.module, flat)
                entry = replace(entry, dims=_run_by_eager(entry, flat, job, run))
                return entry, flat, _samples(source, entry, flat, asked, folder, run, size), run
            except _NotEagerError:
                continue
            except CaptureError as problem:
                first = first or problem
                break
    raise first or CaptureError(f"export: {type(source.module).__name__} does not run on its sample inputs")


class _NotEagerError(Exception):
    """The module itself does not take a size that its program was exported for."""


def _tried(module: nn.Module, inputs: Any, size: int) -> None:
    """Run eager once, so that what is wrong with the model itself is not said of its capture."""
    try:
        with torch.no_grad():
            call_model(module, inputs)
    except Exception as problem:
        raise CaptureError(
            f"export: {type(module).__name__} does not run in eval mode on its sample inputs{f' at batch {size}' if size else ''}: "
            f"{in_short(problem)}",
            hint="give the Job a batch (or inputs=) that its forward takes",
        ) from None


def _run_by_eager(entry: Entry, flat: Flat, job: Job, run: Run) -> dict[str, tuple[int, int]]:
    """The entry's open sizes, from the least that eager runs.

    Raises:
        _NotEagerError: it does not run two thirds of an open length, or an odd one.
    """
    dims = dict(entry.dims)
    if not dims:
        return dims
    whole = flat.tensors(_resized(job, 2))
    lengths = {name: limits for name, limits in dims.items() if name != "batch"}
    if lengths and not all(_runs(run, _cut(entry, whole, lengths, part)) for part in (_two_thirds, _odd)):
        raise _NotEagerError
    for name, (low, high) in lengths.items():
        least = next(
            (
                n
                for n in range(low, min(low + _LEAST_TRIED, high))
                if _runs(run, _cut(entry, whole, {name: (n, high)}, _least))
            ),
            0,
        )
        if not least:
            raise _NotEagerError
        dims[name] = (least, high)
    if "batch" in dims and not _runs(run, flat.tensors(_resized(job, 1))):
        dims["batch"] = (2, dims["batch"][1])
    if "batch" in dims and not _runs(run, flat.tensors(_resized(job, dims["batch"][1]))):
        raise _NotEagerError
    return dims


def _runs(run: Run, tensors: Sequence[torch.Tensor]) -> bool:
    try:
        with torch.no_grad():
            run(tensors)
    except Exception:  # whatever the user's code raises says that this size is none of its
        return False
    return True


def _two_thirds(low: int, size: int) -> int:
    return max(low, size * 2 // 3)


def _odd(low: int, size: int) -> int:
    return max(low, (size // 2) | 1)


def _least(low: int, _size: int) -> int:
    return low


def _has_batch(job: Job) -> bool:
    """Whether any input has a batch dimension: the nodes and edges of one graph have none."""
    try:
        batches.batch_size(job)
    except TargetError:
        return False
    return True


def _resized(job: Job, size: int) -> Any:
    return batches.resized(job, size)[0] if size else job.batch[0]


def _batch_dims(job: Job) -> list[int | None]:
    """Batch dimension of every tensor of the job's inputs."""
    leaves = torch.utils._pytree.tree_leaves(job.batch)
    if not _has_batch(job):
        return [None for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return [d for leaf, d in zip(leaves, batches.dims_of(job), strict=True) if isinstance(leaf, torch.Tensor)]


def _runner(module: nn.Module, flat: Flat) -> Run:
    return lambda tensors: flat.flatten_outputs(call_model(module, flat.inputs(tensors)))


def _samples(
    source: Source, entry: Entry, flat: Flat, asked: Sequence[int], folder: Path, run: Run, size: int
) -> list[Sample]:
    """At the exported sizes, at one, at every asked batch, and where the length is open at two thirds of it and the least."""
    job = source.serving_job
    sizes: list[int] = [size]
    if "batch" in entry.dims:
        low, high = entry.dims["batch"]
        sizes = [b for b in dict.fromkeys((2, 1, *asked)) if low <= b <= high]
    wanted = [flat.tensors(_resized(job, n)) for n in sizes]
    lengths = {name: limits for name, limits in entry.dims.items() if name != "batch"}
    if lengths:
        wanted += [_cut(entry, wanted[0], lengths, part) for part in (_two_thirds, _least)]
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


def _cut(
    entry: Entry,
    tensors: Sequence[torch.Tensor],
    lengths: dict[str, tuple[int, int]],
    part: Callable[[int, int], int],
) -> list[torch.Tensor]:
    """The tensors with each of the open `lengths` cut to part(least, length)."""
    found = []
    for spec, tensor in zip(entry.inputs, tensors, strict=True):
        cut = tensor
        for i, size in enumerate(spec.shape):
            if size in lengths:
                cut = cut.narrow(i, 0, min(tensor.shape[i], part(lengths[str(size)][0], tensor.shape[i])))
        found.append(cut.contiguous())
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


def _fitting(entry: Entry, flat: Flat, source: Source, batch: tuple[Any, Any]) -> tuple[Any, Any] | None:
    """A batch of the user's data, or as many of its samples as the artefact takes; None where its sizes are not served."""
    if _fits(entry, flat, source, batch):
        return batch
    most = entry.dims["batch"][1] if "batch" in entry.dims else _fixed_batch(entry, source)
    try:
        cut = batches.split(source.job, batch, (0, most))
    except (TargetError, RuntimeError, IndexError):  # no batch dimension, or fewer samples than that
        return None
    return cut if _fits(entry, flat, source, cut) else None


def _fixed_batch(entry: Entry, source: Source) -> int:
    dims = _batch_dims(source.serving_job)
    return next((int(spec.shape[d]) for spec, d in zip(entry.inputs, dims, strict=True) if d is not None), 1)


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
