"""Serving under a plan: `start(job, plan, train=False)` gives a ForwardRun, whose `forward` computes outputs only.

    inputs (the same in every process)
      ├─ microbatch 0 ─ replica 0's samples ─ stage 0 ─▶ stage 1 ─▶ outputs ┐
      │                 replica 1's samples ─ stage 0 ─▶ stage 1 ─▶ outputs ┤ put together, in the order of the samples,
      └─ microbatch 1 ─ ...                                                 ┘ in every process (or in the first one)

The same captured chain as in training, in eval mode: no gradients, no optimizer state, no loss. Under pipeline stages
the microbatches follow one another, so that every stage works on another one.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from plait.capture import batch as batches
from plait.capture.inference import served_inputs
from plait.capture.job import Job
from plait.errors import PlanError, RequestError
from plait.run.apply import Applied
from plait.run.outputs import OutputDims, Pieces, gathered
from plait.run.pipeline import run_forward_pipeline, schedule_for
from plait.run.precision import autocast_for
from plait.run.shares import shares
from plait.schema import Graph

__all__ = ["ForwardRun"]


class ForwardRun:
    """A plan's forward in this process; what `start(..., train=False)` returns."""

    def __init__(self, job: Job, applied: Applied) -> None:
        self.job = job
        self.applied = applied
        self.plan = applied.plan
        self.world = applied.world
        self.captured = applied.captured
        self._dims = OutputDims(job, applied)
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release what the run holds beyond Python objects; the process group stays with whoever made it."""
        self._schedules.clear()

    @property
    def graph(self) -> Graph:
        """The captured model's record."""
        assert self.applied.program.graph is not None
        return self.applied.program.graph

    def step(self, *_: Any, **__: Any) -> float:
        """Refused.

        Raises:
            RequestError: always: this run has no optimizer.
        """
        raise RequestError(
            "run: it was started with train=False and has no optimizer", hint="use plait.start(job, plan)"
        )

    def forward(self, inputs: Any, *, to: Literal["all", "first"] = "all") -> Any:
        """The model's outputs for a global batch, the same inputs in every process, in the structure the model gives.

        Every process gets them, or with `to="first"` only the first one (None elsewhere), which saves sending them to
        the others. Any number of samples, also one that the plan does not divide: shares may be of different sizes, and
        empty.

        Raises:
            TargetError: inputs are of another structure, shape or dtype than the sample.
            PlanError: an output cannot be put together from the parts of a batch that this plan makes.
        """
        batch = served_inputs(self.job, inputs)
        size = batches.batch_size(self.job, batch)
        table = shares(size, min(self.plan.microbatches, size), self.plan.replicas, self.plan.batch_shares)
        sizes = sorted({max(1, stop - start) for row in table for start, stop in row})
        is_padded = [self._size_that_runs(n) != n for n in sizes]
        self._dims.check(2 if any(is_padded) else sum(stop > start for row in table for start, stop in row))
        mine = [row[self.world.replica] for row in table]
        outputs, structure = self._compute([self._part(batch, bounds, size) for bounds in mine])
        pieces = None
        if outputs is not None:
            real = [
                self._dims.narrowed(one, stop - start, self._size_that_runs(stop - start))
                for one, (start, stop) in zip(outputs, mine, strict=True)
                if stop > start
            ]
            pieces = Pieces(real, [stop - start for start, stop in mine if stop > start])
        leaves = gathered(pieces, table, self._dims, self.world, self.plan, to)
        return None if leaves is None else structure(leaves)

    def _size_that_runs(self, samples: int) -> int:
        """How many samples a part of so many is run as: more where the model cannot be captured at that size.

        All processes ask for the same sizes in the same order, and agree: one stage alone may be what differs.
        """
        if not self.captured or samples in self._sizes:
            return self._sizes.get(samples, samples)
        problem: PlanError | None = None
        try:
            self.applied.program_for(samples)
        except PlanError as refusal:
            problem = refusal
        everyone: list[Any] = [problem]
        if self.world.size > 1:
            everyone = [None] * self.world.size
            dist.all_gather_object(everyone, problem)
        first = self.applied.program
        found = samples
        refusals = [one for one in everyone if one is not None]
        if refusals:
            found = max(samples, first.sizes[0]) if first.dynamic else first.batch
            if not first.accepts(found) or found < samples:
                raise refusals[0]
        self._sizes[samples] = found
        return found

    def _part(self, batch: tuple[Any, Any], bounds: tuple[int, int], size: int) -> tuple[Any, Any]:
        start, stop = bounds
        # An empty share still takes part in every collective: a stand-in whose outputs are dropped.
        low = min(start, size - 1)
        part = batches.split(self.job, batch, (low, max(stop, low + 1)))
        count = max(1, stop - start)
        padded = self._size_that_runs(count)
        index = torch.arange(padded) % count

        def moved(leaf: torch.Tensor, dim: int | None) -> torch.Tensor:
            return (leaf if dim is None or padded == count else leaf.index_select(dim, index)).to(self.world.device)

        return batches.map_batch(self.job, part, moved)

    def _compute(self, parts: list[tuple[Any, Any]]) -> tuple[list[tuple[torch.Tensor, ...]] | None, Any]:
        """Each part's output tensors where the last stage is, else None; and what puts leaves into their structure."""
        sizes = [batches.batch_size(self.job, part) for part in parts]
        inputs = [self._stage_inputs(part, size) for part, size in zip(parts, sizes, strict=True)]
        with torch.no_grad(), autocast_for(self.plan, self.world.device):
            if self.plan.pp > 1:
                schedule = self._schedule(tuple(sizes))
                return run_forward_pipeline(schedule, inputs), self.applied.program.outputs_of
            stage = self.applied.stages[0]
            results = [stage(**one) for one in inputs]
        if self.captured:
            return results, self.applied.program.outputs_of
        return results, stage.structure

    def _stage_inputs(self, part: tuple[Any, Any], size: int) -> dict[str, Any]:
        places = self.applied.program_for(size).placeholders
        names = [n for n, place in places.items() if place.kind == "input"]
        return {**dict(zip(names, pytree.tree_leaves(part), strict=True)), "samples": size}

    def _schedule(self, sizes: tuple[int, ...]) -> Any:
        if sizes not in self._schedules:
            group = self.world.group("pp")
            assert group is not None
            edges = [self.applied.edges_for(n) for n in sizes]
            self._schedules[sizes] = schedule_for(
                self.plan, self.applied.stages, edges, list(sizes), self.world.device, group, None
            )
        return self._schedules[sizes]
