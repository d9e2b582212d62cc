"""Weights of a run into a model under another plan, or the same: parameters and buffers, nothing of the optimizer."""

from __future__ import annotations

from pathlib import Path

from plait.errors import CheckpointError
from plait.run import checkpoint
from plait.run.apply import Applied
from plait.run.checkpoint_index import INDEX

__all__ = ["find_checkpoint", "load_weights"]


def find_checkpoint(place: Path) -> Path:
    """A checkpoint's directory: `place` itself, or the newest of the run directory `place`.

    Raises:
        CheckpointError: there is none.
    """
    if (place / INDEX).is_file():
        return place
    newest = checkpoint.latest(place)
    if newest is None:
        what = "no such directory" if not place.is_dir() else "no complete checkpoint in it"
        raise CheckpointError(
            f"weights {place}: {what}",
            hint="give the --run-dir of a `plait train` that has saved a checkpoint, or one of its checkpoints/step-*",
        )
    return newest


def load_weights(place: Path, applied: Applied) -> None:
    """Fill this process's share of parameters and buffers from a run directory or checkpoint, saved under any plan.

    Every process calls this with its own share.

    Raises:
        CheckpointError: there is no checkpoint, or it is broken or of another model.
    """
    wanted = {h.name: checkpoint.Shard(h.local.detach(), h.layout, h.owns) for h in applied.held()}
    checkpoint.load(find_checkpoint(place), wanted, strict=False)
