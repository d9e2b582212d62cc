"""Outputs of the parts of a batch, put together: which dimension is the batch's, and who sends what to whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import fx

from plait.capture.job import Job
from plait.capture.trace import trace
from plait.errors import CaptureError, PlanError
from plait.run.apply import Applied
from plait.run.world import World
from plait.schema import Plan

__all__ = ["OutputDims", "Pieces", "gathered"]


@dataclass
class Pieces:
    """What one process computed: the output tensors of each of its parts, in order."""

    outputs: list[tuple[torch.Tensor, ...]]
    sizes: list[int]
    """Samples of each part."""


class OutputDims:
    """The batch dimension of each output tensor, found when it is first needed.

    From the capture: the dimension whose size follows the open batch; where the capture has a fixed batch, from one
    more capture of one sample more. A model that runs on its own modules: the Job's `batch_dim`, checked on the tensors.
    """

    def __init__(self, job: Job, applied: Applied) -> None:
        self._job = job
        self._applied = applied
        self._dims: list[int | None] | None = None

    def check(self, parts: int) -> None:
        """Find them if a batch is cut into more than one part.

        Raises:
            PlanError: an output has no batch dimension, or several, and depends on the inputs.
        """
        if parts > 1 and self._dims is None and self._applied.captured:
            self._dims = self._found()

    def narrowed(self, part: tuple[torch.Tensor, ...], samples: int, ran_as: int) -> tuple[torch.Tensor, ...]:
        """A part's outputs without those of the samples that it was filled up with."""
        if samples == ran_as or self._dims is None:
            return part
        return tuple(
            t if dim is None else t.narrow(dim, 0, t.shape[dim] * samples // ran_as)
            for t, dim in zip(part, self._dims, strict=True)
        )

    def of(self, pieces: list[torch.Tensor], index: int, sizes: list[int]) -> int | None:
        """The dimension along which these pieces of output `index` are joined; None: they are all the same."""
        if self._applied.captured:
            assert self._dims is not None
            return self._dims[index]
        dim = self._job.batch_dim if isinstance(self._job.batch_dim, int) else 0
        if any(p.dim() <= dim or p.shape[dim] != n for p, n in zip(pieces, sizes, strict=True)):
            raise PlanError(
                f"plan: output {index} has shape {list(pieces[0].shape)} for {sizes[0]} samples, without a batch "
                f"dimension {dim}: the parts of a batch cannot be put together",
                hint="use dp=1, fsdp=1 and microbatches=1, or leave it out of the model's outputs",
            )
        return dim

    def _found(self) -> list[int | None]:
        program = next((c.program for c in self._applied.captures if c.program.dynamic), None)
        first = self._applied.program
        other = None
        if program is None:
            try:
                other = trace(first.job, module=self._applied.module, batch=first.batch + 1, train=False)
            except CaptureError as problem:
                raise PlanError(
                    f"plan: it cuts a batch, and which dimension of the outputs that is, a second capture cannot tell: "
                    f"{problem.message}",
                    hint="use dp=1, fsdp=1 and microbatches=1",
                ) from None
            if other.dynamic:
                program, other = other, None
        own: Any = (program or first).module.graph.output_node().args[0]
        theirs: Any = other.module.graph.output_node().args[0] if other is not None else None
        found = []
        for index, node in enumerate(own):
            like = None if theirs is None else theirs[index]
            found.append(self._dim_of(node, like, index))
        return found

    def _dim_of(self, node: fx.Node, like: fx.Node | None, index: int) -> int | None:
        shape = node.meta["val"].shape
        if like is None:
            dims = [i for i, size in enumerate(shape) if isinstance(size, torch.SymInt)]
        else:
            dims = [i for i, (a, b) in enumerate(zip(shape, like.meta["val"].shape, strict=True)) if a != b]
        if len(dims) == 1:
            return dims[0]
        if not dims and not _depends_on_inputs(node, self._applied.program.placeholders):
            return None
        what = f"{len(dims)} dimensions that grow with the batch" if dims else "no batch dimension"
        raise PlanError(
            f"plan: output {index} ({node.name}, {[str(n) for n in shape]}) has {what}: the parts into which this plan "
            "cuts a batch cannot be put together",
            hint="use dp=1, fsdp=1 and microbatches=1, or leave it out of the model's outputs",
        )


def _depends_on_inputs(node: fx.Node, placeholders: dict[str, Any]) -> bool:
    stack, seen = [node], set()
    while stack:
        one = stack.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.op == "placeholder" and one.name in placeholders and placeholders[one.name].kind == "input":
            return True
        stack += one.all_input_nodes
    return False


def gathered(
    pieces: Pieces | None,
    table: list[list[tuple[int, int]]],
    dims: OutputDims,
    world: World,
    plan: Plan,
    to: Literal["all", "first"],
) -> list[torch.Tensor] | None:
    """The whole batch's output tensors, here if `to` says so; `pieces` are this process's own, None without the last stage.

    `table[microbatch][replica]` are bounds in the batch. One process of each replica sends: the last stage's first.
    """
    senders = _senders(world, plan)
    used = [r for r in range(plan.replicas) if any(row[r][1] > row[r][0] for row in table)]
    if world.size == 1:
        assert pieces is not None
        return _joined({0: pieces.outputs}, table, dims)
    shapes = _shapes(pieces, world, senders)
    received: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    for replica in used:
        outputs = pieces.outputs if pieces is not None and world.rank == senders[replica] else None
        received[replica] = _moved(outputs, shapes[senders[replica]], senders[replica], world, to)
    if to == "first" and world.rank != 0:
        return None
    return _joined(received, table, dims)


def _senders(world: World, plan: Plan) -> list[int]:
    """The global rank of each replica's process that has the outputs."""
    if world.mesh is None:
        return [0]
    last = world.mesh.mesh[(plan.stages - 1) % plan.pp]  # dp x fsdp x tp
    return [int(rank) for rank in last.reshape(plan.replicas, plan.tp)[:, 0]]


_Shapes = list[list[tuple[tuple[int, ...], torch.dtype]]]


def _shapes(pieces: Pieces | None, world: World, senders: list[int]) -> list[_Shapes]:
    """Shapes and dtypes of every sender's parts, by rank: they may depend on data and on autocast."""
    own: _Shapes = []
    if pieces is not None and world.rank in senders:
        own = [[(tuple(t.shape), t.dtype) for t in part] for part in pieces.outputs]
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, own)
    return everyone


def _moved(
    outputs: list[tuple[torch.Tensor, ...]] | None, shapes: _Shapes, sender: int, world: World, to: str
) -> list[tuple[torch.Tensor, ...]]:
    """One sender's parts, where they are wanted; as bytes in one message, so that every dtype goes."""
    length = sum(_bytes(shape, dtype) for part in shapes for shape, dtype in part)
    if outputs is not None:
        flat = [t.contiguous().reshape(-1).view(torch.uint8) for part in outputs for t in part]
        buffer = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=world.device)
    else:
        buffer = torch.empty(length, dtype=torch.uint8, device=world.device)
    if to == "all":
        dist.broadcast(buffer, sender)
    elif sender != 0 and world.rank == sender:
        dist.send(buffer, 0)
    elif sender != 0 and world.rank == 0:
        dist.recv(buffer, sender)
    if outputs is not None:
        return outputs
    begin, parts = 0, []
    for part in shapes:
        made = []
        for shape, dtype in part:
            end = begin + _bytes(shape, dtype)
            # Cloned: a view at any offset may not be aligned for its dtype.
            made.append(buffer[begin:end].clone().view(dtype).reshape(shape))
            begin = end
        parts.append(tuple(made))
    return parts


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize


def _joined(
    received: dict[int, list[tuple[torch.Tensor, ...]]], table: list[list[tuple[int, int]]], dims: OutputDims
) -> list[torch.Tensor]:
    """Parts in the order of their samples, joined."""
    rest = {replica: iter(parts) for replica, parts in received.items()}
    ordered, sizes = [], []
    for row in table:
        for replica, (start, stop) in enumerate(row):
            if stop > start:
                ordered.append(next(rest[replica]))
                sizes.append(stop - start)
    if len(ordered) == 1:
        return list(ordered[0])
    leaves = []
    for index in range(len(ordered[0])):
        column = [part[index] for part in ordered]
        dim = dims.of(column, index, sizes)
        leaves.append(column[0] if dim is None else torch.cat(column, dim))
    return leaves
