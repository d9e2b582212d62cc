"""Any size by a runtime whose graphs have fixed sizes: one graph for each rung of a ladder.

    batch                               1, 4, 16 ... and the largest; between two, filled up with copies of the last sample
    length of a decoder's `forward`     the largest; a shorter one is filled up on the right, where a decoder does not look
    length of its `prefill`             2, 8, 32 ...; the largest that is not longer, and `decode` for the positions after it

Any other open length is left to an attempt that closes it. That a model is a decoder in this sense was proven before there was a `decode`,
and every rung is held against eager like everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plait.errors import ServeError
from plait.serve.backend import Runner
from plait.serve.subject import Entry, Sample, Subject, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Graph", "Rung", "inputs_at", "ladder", "rungs", "sample_of", "served", "unfit"]

Graph = Callable[[str, "Rung", Sequence["torch.Tensor"]], Sequence["torch.Tensor"]]
"""Runs the graph of an entry point (by its name) and a rung on inputs of just its sizes; outputs in the entry's own types."""


@dataclass(frozen=True, slots=True, order=True)
class Rung:
    """Sizes of one graph."""

    batch: int
    length: int = 0
    """0 where the entry point has no open length."""

    @property
    def name(self) -> str:
        """`b4`, or `b4_l32`."""
        return f"b{self.batch}" + (f"_l{self.length}" if self.length else "")

    @classmethod
    def parse(cls, name: str) -> Rung:
        """What `name` gave.

        Raises:
            ValueError: it is no rung's name.
        """
        batch, _, length = name.partition("_")
        if batch[:1] != "b" or (length and length[:1] != "l"):
            raise ValueError(f"{name!r} names no sizes")
        return cls(int(batch[1:]), int(length[1:]) if length else 0)


def sample_of(subject: Subject, entry: Entry) -> Sample:
    """The first sample with the sizes that the subject closes."""
    fitting = (s for s in entry.samples if all(s.sizes.get(name) == size for name, size in subject.closed.items()))
    return next(fitting)


def ladder(subject: Subject, entry: Entry) -> list[int]:
    """Batch sizes to write graphs for; the one there is where the batch is closed."""
    if "batch" in subject.closed or "batch" not in entry.dims:
        return [int(subject.closed.get("batch", sample_of(subject, entry).sizes.get("batch", 1)))]
    least, most = entry.dims["batch"]
    return sorted({least, most, *(size for size in _fourfold(1, most) if size >= least)})


def _fourfold(first: int, most: int) -> list[int]:
    found = []
    while first <= most:
        found.append(first)
        first *= 4
    return found


def unfit(subject: Subject) -> str:
    """Why no ladder serves the subject's entry points, in a few words; empty where one does."""
    for name, entry in subject.entries.items():
        lengths = _lengths(subject, entry)
        is_decoder = "decode" in subject.entries and name in ("forward", "prefill")
        if lengths and not (is_decoder and len(lengths) == 1 and len(entry.inputs) == 1):
            return f"its graphs have fixed sizes, and {', '.join(lengths)} is open in {name}"
    return ""


def rungs(subject: Subject, name: str) -> list[Rung]:
    """Every graph to write for an entry point.

    Raises:
        ValueError: a length is open that no ladder serves.
    """
    why = unfit(subject)
    if why:
        raise ValueError(why)
    entry = subject.entries[name]
    lengths = _lengths(subject, entry)
    if not lengths:
        return [Rung(batch) for batch in ladder(subject, entry)]
    least, most = entry.dims[lengths[0]]
    steps = [most] if name == "forward" else [size for size in _fourfold(2, most) if size >= least]
    return [Rung(batch, length) for batch in ladder(subject, entry) for length in steps]


def _lengths(subject: Subject, entry: Entry) -> list[str]:
    used = {size for spec in (*entry.inputs, *entry.outputs) for size in spec.shape if isinstance(size, str)}
    return [dim for dim in entry.dims if dim != "batch" and dim not in subject.closed and dim in used]


def inputs_at(subject: Subject, name: str, rung: Rung) -> tuple[torch.Tensor, ...]:
    """A sample's inputs, cut or repeated to the sizes of a graph."""
    entry = subject.entries[name]
    values = subject.inputs(sample_of(subject, entry), name)
    return tuple(_sized(value, spec, rung) for value, spec in zip(values, entry.inputs, strict=True))


def _sized(value: torch.Tensor, spec: TensorSpec, rung: Rung) -> torch.Tensor:
    for dim, size in enumerate(spec.shape):
        wanted = rung.batch if size == "batch" else rung.length
        if isinstance(size, str) and wanted:
            repeats = [1] * value.dim()
            repeats[dim] = -(-wanted // value.shape[dim])
            value = value.repeat(repeats).narrow(dim, 0, wanted)
    return value.contiguous()


def served(entry: Entry, steps: Sequence[Rung], graph: Graph) -> Runner:
    """A runner of any size within the ladder.

    Raises (when it is called):
        ServeError: the sizes are beyond the largest graph.
    """
    batches = sorted({step.batch for step in steps})
    lengths = sorted({step.length for step in steps})

    def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        have = _size(entry, inputs, "batch", batches[0])
        batch = next((size for size in batches if size >= have), None)
        if batch is None:
            raise ServeError(f"{entry.name}: a batch of {have}, and the graphs serve at most {batches[-1]}")
        filled = [_filled(value, spec, "batch", batch) for value, spec in zip(inputs, entry.inputs, strict=True)]
        if not lengths[-1]:
            outputs = graph(entry.name, Rung(batch), filled)
        elif entry.name == "prefill":
            outputs = _position_by_position(filled[0], batch, lengths, graph)
        else:
            outputs = _filled_on_the_right(entry, filled[0], Rung(batch, lengths[-1]), graph)
        return [_cut(value, spec, "batch", have) for value, spec in zip(outputs, entry.outputs, strict=True)]

    return run


def _position_by_position(
    tokens: torch.Tensor, batch: int, lengths: Sequence[int], graph: Graph
) -> Sequence[torch.Tensor]:
    import torch

    start = max((length for length in lengths if length <= tokens.shape[1]), default=0)
    if not start:
        raise ServeError(f"prefill: {tokens.shape[1]} tokens, and the graphs take at least {lengths[0]}")
    outputs = graph("prefill", Rung(batch, start), [tokens[:, :start].contiguous()])
    for position in range(start, tokens.shape[1]):
        one = tokens[:, position : position + 1].contiguous()
        outputs = graph("decode", Rung(batch), [one, torch.tensor([position]), *outputs[1:]])
    return outputs


def _filled_on_the_right(entry: Entry, tokens: torch.Tensor, rung: Rung, graph: Graph) -> Sequence[torch.Tensor]:
    have = tokens.shape[1]
    if have > rung.length:
        raise ServeError(f"{entry.name}: {have} tokens, and the graphs serve at most {rung.length}")
    length = next(str(size) for size in entry.inputs[0].shape[1:] if isinstance(size, str))
    outputs = graph(entry.name, rung, [_filled(tokens, entry.inputs[0], length, rung.length)])
    return [_cut(value, spec, length, have) for value, spec in zip(outputs, entry.outputs, strict=True)]


def _size(entry: Entry, inputs: Sequence[torch.Tensor], name: str, otherwise: int) -> int:
    for spec, value in zip(entry.inputs, inputs, strict=True):
        if name in spec.shape:
            return int(value.shape[spec.shape.index(name)])
    return otherwise


def _filled(value: torch.Tensor, spec: TensorSpec, name: str, size: int) -> torch.Tensor:
    """With copies of the last part behind it where the dimension `name` is shorter than `size`."""
    import torch

    if name not in spec.shape or value.shape[spec.shape.index(name)] == size:
        return value
    dim = spec.shape.index(name)
    have = value.shape[dim]
    shape = list(value.shape)
    shape[dim] = size - have
    return torch.cat([value, value.narrow(dim, have - 1, 1).expand(shape)], dim)


def _cut(value: torch.Tensor, spec: TensorSpec, name: str, size: int) -> torch.Tensor:
    if name not in spec.shape or value.shape[spec.shape.index(name)] == size:
        return value
    return value.narrow(spec.shape.index(name), 0, size)
