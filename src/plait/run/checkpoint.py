"""Checkpoints of a run: saved under one plan, read under any other.

    RUN_DIR/checkpoints/step-00000120.tmp/    while it is written (`checkpoint_index.py` draws what is inside)
    RUN_DIR/checkpoints/step-00000120/        renamed when every process has written its part

Each process hands over its local tensors by the user's own names with the layout each has, and
torch.distributed.checkpoint sees to it that every element is written once and found again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _DistWrapper

from plait.errors import CheckpointError, PlaitError
from plait.run.checkpoint_files import PieceReader, PieceWriter, ReadPlanner, Shard, WritePlanner
from plait.run.checkpoint_index import INDEX, Index, PieceFiles, write_text
from plait.run.plain_state import from_plain, to_plain
from plait.run.tensor_file import write_tensors

__all__ = ["Restored", "Shard", "checkpoints", "iterate_whole", "latest", "load", "save"]

_NAME = re.compile(r"step-(\d{8,})")
MODEL = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Restored:
    """What a checkpoint holds beside tensors."""

    step: int
    state: dict[str, Any]
    rank_state: Any
    """What this rank saved for itself; None if the checkpoint is of another number of processes."""


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in entries if _NAME.fullmatch(p.name) and (p / INDEX).is_file()), key=_step_of)


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run; None if there is none."""
    return next(reversed(checkpoints(run_dir)), None)


def save(
    run_dir: Path,
    step: int,
    shards: Mapping[str, Shard],
    *,
    state: Mapping[str, Any],
    rank_state: Any = None,
    model: Collection[str] = (),
    aliases: Mapping[str, str] | None = None,
    keep: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """The directory of the checkpoint of `step`, complete on all processes when this returns; the last `keep` stay.

    Every process of `group` (the world if None) calls this. `shards` are its own tensors: parameters and buffers
    under the user's names, optimizer state under `optimizer.<state>.<parameter>`. `state` (rank 0's counts) and
    `rank_state` (each rank's) are plain values (see `plain_state`). `model` are the names, the same on every process,
    of which `model.safetensors` is made, in that order; `aliases` the other names of tied ones. The run directory is
    one that all processes see. No process holds more than one whole tensor at a time.

    Raises:
        PlaitError: something cannot be written, on all processes alike; older checkpoints are as they were.
    """
    together = _together(group)
    folder = run_dir / "checkpoints"
    final, aside = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
    extra: dict[str, Any] = {"step": step, "aliases": dict(aliases or {}), "model": list(model)}

    def begin() -> None:
        extra["state"] = to_plain(dict(state))
        _fresh_directory(aside)

    def write_own_state() -> None:
        text = json.dumps(to_plain(rank_state, "rank_state"))
        write_text(aside / f"rank-{together.get_rank():05d}.json", text)

    with _failures_named(f"checkpoint {final} cannot be written"):
        together.broadcast("begin", begin)
        together.all_gather("rank state", write_own_state)
        with _silent_when_alone(together):
            state_dict_saver.save(
                {},
                storage_writer=PieceWriter(aside, extra, together.get_world_size()),
                planner=WritePlanner(shards),
                process_group=group,
                no_dist=not together.use_dist,
            )
        together.broadcast("complete", lambda: _complete(aside, final, model, aliases or {}))
        together.broadcast("retention", lambda: _drop_old(run_dir, keep))
    return final


def load(
    directory: Path, wanted: Mapping[str, Shard], *, strict: bool = True, group: dist.ProcessGroup | None = None
) -> Restored:
    """Fill the local tensors of `wanted` in place from a checkpoint of any plan; gives the state beside them.

    Every process of `group` (the world if None) calls this with its own shards. With `strict`, all names of the
    checkpoint must be wanted by some process.

    Raises:
        CheckpointError: it is incomplete, truncated or of another model; names the first thing that is wrong. Every
            process raises it; local tensors may then hold a part.
    """
    together = _together(group)
    directory = Path(directory)
    with _failures_named(f"checkpoint {directory} cannot be read"):
        index = together.broadcast("index", lambda: Index.read(directory))
        with _silent_when_alone(together):
            state_dict_loader.load(
                {},
                storage_reader=PieceReader(directory, index),
                planner=ReadPlanner(wanted, index, directory, strict=strict),
                process_group=group,
                no_dist=not together.use_dist,
            )
        rank_state = None
        if index.world_size == together.get_world_size():
            rank = together.get_rank()
            rank_state = together.all_gather("rank state", lambda: _own_state(directory, rank))[rank]
    step, state = index.extra.get("step"), from_plain(index.extra.get("state"))
    if not isinstance(step, int) or not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {directory}: {INDEX} has no step and state")
    return Restored(step, state, rank_state)


def iterate_whole(directory: Path, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole tensors of a checkpoint one by one, on the CPU; by default the model's.

    Raises:
        CheckpointError: the checkpoint is broken or lacks a name.
    """
    index = Index.read(directory)
    with PieceFiles(directory) as files:
        for name in index.extra.get("model", ()) if names is None else names:
            if name not in index.tensors:
                raise CheckpointError(f"checkpoint {directory} has no {name}")
            yield name, files.whole(index.tensors[name])


def _step_of(path: Path) -> int:
    found = _NAME.match(path.name)
    assert found is not None
    return int(found[1])


def _together(group: dist.ProcessGroup | None) -> _DistWrapper:
    """DCP's collectives whose failures reach every process; alone they do nothing."""
    return _DistWrapper(group, dist.is_available() and dist.is_initialized(), 0)


@contextmanager
def _failures_named(what: str) -> Iterator[None]:
    """The first process's own error in place of DCP's collection of them."""
    try:
        yield
    except CheckpointException as problem:
        rank, (first, _) = min(problem.failures.items())
        if isinstance(first, PlaitError | KeyboardInterrupt):
            raise first from None
        raise PlaitError(f"{what}: rank {rank}: {type(first).__name__}: {first}") from first


@contextmanager
def _silent_when_alone(together: _DistWrapper) -> Iterator[None]:
    """Without DCP's warning that there is one process, where that is meant."""
    if together.use_dist:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _fresh_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _own_state(directory: Path, rank: int) -> Any:
    path = directory / f"rank-{rank:05d}.json"
    try:
        return from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"checkpoint {directory}: {path.name} cannot be read: {problem}") from None


def _complete(aside: Path, final: Path, model: Collection[str], aliases: Mapping[str, str]) -> None:
    """Add the whole model and give the directory its name."""
    if model:
        stored = Index.read(aside).tensors
        specs = [(name, stored[name].dtype, stored[name].shape) for name in model]
        # safetensors' own convention for tied names: the metadata says which kept name stands for a dropped one.
        metadata = {"format": "pt", **{alias: name for alias, name in aliases.items() if name in set(model)}}
        write_tensors(aside / MODEL, specs, (tensor for _, tensor in iterate_whole(aside, model)), metadata)
    if final.exists():
        _remove(final)
    aside.rename(final)
    _sync_directory(final.parent)


def _drop_old(run_dir: Path, keep: int) -> None:
    for path in checkpoints(run_dir)[: -max(keep, 1)]:
        _remove(path)
    for path in (run_dir / "checkpoints").glob("step-*.tmp"):
        shutil.rmtree(path)  # of a run that was stopped while it wrote or removed one


def _remove(path: Path) -> None:
    """Take the name away first, so that half a directory is never taken for a checkpoint."""
    doomed = path.with_name(f"{path.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
