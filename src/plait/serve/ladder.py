"""Any batch by a runtime whose graphs have fixed sizes: one graph for each batch of a ladder, a batch between two filled up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plait.serve.subject import Entry, Subject

if TYPE_CHECKING:
    import torch

__all__ = ["at_batch", "filled_up", "ladder", "sample_of"]


def sample_of(subject: Subject, entry: Entry) -> Any:
    """The first sample with the sizes that the subject closes."""
    fitting = (s for s in entry.samples if all(s.sizes.get(name) == size for name, size in subject.closed.items()))
    return next(fitting)


def ladder(subject: Subject, entry: Entry) -> list[int]:
    """Batch sizes to write graphs for: 1, 4, 16 ... and the largest; the one there is where the batch is closed."""
    if "batch" in subject.closed or "batch" not in entry.dims:
        return [int(subject.closed.get("batch", sample_of(subject, entry).sizes.get("batch", 1)))]
    least, most = entry.dims["batch"]
    steps = {least, most}
    size = 1
    while size < most:
        steps |= {size} if size >= least else set()
        size *= 4
    return sorted(steps)


def at_batch(inputs: tuple[torch.Tensor, ...], entry: Entry, size: int) -> tuple[torch.Tensor, ...]:
    """The inputs cut or repeated to a batch size."""
    made = []
    for value, spec in zip(inputs, entry.inputs, strict=True):
        if not spec.shape or spec.shape[0] != "batch":
            made.append(value)
            continue
        repeats = -(-size // len(value))
        made.append(value.repeat(repeats, *[1] * (value.dim() - 1))[:size].contiguous())
    return tuple(made)


def filled_up(value: torch.Tensor, size: int) -> torch.Tensor:
    """A batch of fewer samples with copies of its last one behind it."""
    import torch

    return torch.cat([value, value[-1:].expand(size - len(value), *value.shape[1:])])
