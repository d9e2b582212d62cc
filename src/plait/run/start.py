"""`start`: a job under a plan, as a Run whose `step` trains one global batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from plait.capture import batch as batches
from plait.capture.build import build
from plait.capture.job import Job
from plait.capture.trace import loss_of, trace
from plait.errors import DivergedError, PlanError
from plait.run.apply import Applied, apply, check, local_of
from plait.run.batchnorm import nothing_counts
from plait.run.pipeline import run_pipeline, schedule_for
from plait.run.precision import autocast_for
from plait.run.shares import shares
from plait.run.world import World, join
from plait.schema import Plan

__all__ = ["Run", "start"]


def start(
    job: Job,
    plan: Plan | str | Path,
    *,
    batch: int | None = None,
    seed: int = 0,
    world: World | None = None,
    change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> Run:
    """The job under a plan (a Plan, a SPEC text or a file's path), ready to step, in every process of the plan.

    `batch` is the usual global batch in samples (the job's sample batch if None); other sizes may follow.
    `change(name, value)` may alter initial values.

    Raises:
        PlanError: the plan fits neither the processes, nor the batch, nor the model.
        CaptureError: the model cannot be captured and the plan needs it to be.
    """
    size = batches.batch_size(job) if batch is None else batch
    bound = Plan.load(plan).bound(batch=size)
    world = world or join(bound)
    built = build(job, seed=seed, values=True)
    if change is not None:
        built = built.changed(change)
    part = max(1, max(stop - start for row in shares(size, bound.microbatches, bound.replicas) for start, stop in row))
    program = trace(job, module=built.module, batch=part)
    assert program.graph is not None
    check(bound, program.graph)
    applied = apply(program, built, bound, world)
    # Replicas draw different random numbers; processes that share a sample (tp) the same ones.
    torch.manual_seed(seed * 1_000_003 + world.replica * 1009 + world.index("pp") + 1)
    return Run(job, applied, _named(built.module, applied))


def _named(module: torch.nn.Module, applied: Applied) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what this process holds, in the user's order."""
    held = []
    for name, _ in module.named_parameters():
        if name in applied.parameters:
            tensor = applied.parameters[name].tensor
            assert isinstance(tensor, torch.nn.Parameter)
            held.append((name, tensor))
    return held


def _optimizer(job: Job, named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer | None:
    """The user's optimizer over this process's share; None where it holds no parameter."""
    if not named:
        return None
    if job.optimizer is None:
        return torch.optim.AdamW(named, lr=1e-3)
    return job.optimizer(named)


class Run:
    """The plan under way in this process."""

    def __init__(self, job: Job, applied: Applied, named: list[tuple[str, torch.nn.Parameter]]) -> None:
        self.job = job
        self.applied = applied
        self.plan = applied.plan
        self.world = applied.world
        self.steps_done = 0
        self.captured = True
        self.optimizer = _optimizer(job, named)
        self.scheduler = job.scheduler(self.optimizer) if job.scheduler and self.optimizer else None
        self._schedules: dict[tuple[int, ...], Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release what the run holds beyond Python objects; the process group stays with whoever made it."""
        self._schedules.clear()

    def step(self, inputs: Any, targets: Any) -> float:
        """Train one global batch, the same in every process; the global mean loss, in every process.

        Raises:
            DivergedError: the loss is not finite; names the first parameter that is not. Nothing was stepped.
        """
        loss = self.forward_backward(inputs, targets)
        self.update()
        return loss

    def forward_backward(self, inputs: Any, targets: Any) -> float:
        """The global mean loss; gradients are complete and clipped, nothing is stepped yet."""
        parts, weights = self._parts((inputs, targets))
        self._begin()
        losses = self._train_parts(parts, weights)
        self._complete_gradients()
        loss = self._global_loss(losses)
        if not math.isfinite(loss):
            self._raise_diverged(loss)
        self._clip()
        return loss

    def update(self) -> None:
        """Step the optimizer and the learning-rate scheduler."""
        if self.optimizer is not None:
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps_done += 1

    @property
    def has_batch_norm(self) -> bool:
        """Whether the captured model normalises over the batch."""
        target = torch.ops.aten.batch_norm.default
        return any(node.target is target and node.args[5] for node in self.applied.program.module.graph.nodes)

    # -- the parts of a batch

    def _parts(self, batch: tuple[Any, Any]) -> tuple[list[tuple[Any, Any]], list[float]]:
        """This process's microbatches, and each one's weight in the step's loss (0 for a stand-in)."""
        size = batches.batch_size(self.job, batch)
        count = min(self.plan.microbatches, size)
        table = shares(size, count, self.plan.replicas)
        weights = self._weights(batch, table, size)
        parts = []
        for row in table:
            start, stop = row[self.world.replica]
            if start == stop:  # an empty share still takes part in every collective, with a weight of zero
                start, stop = (start, start + 1) if start < size else (size - 1, size)
            part = batches.split(self.job, batch, (start, stop))
            parts.append(batches.map_batch(self.job, part, lambda leaf, _: leaf.to(self.world.device)))
        return parts, [row[self.world.replica] for row in weights]

    def _weights(self, batch: tuple[Any, Any], table: list[list[tuple[int, int]]], size: int) -> list[list[float]]:
        function = self.job.loss_weight
        if function is None:
            return [[(stop - start) / size for start, stop in row] for row in table]
        raw = [
            [
                0.0 if start == stop else float(function(batches.split(self.job, batch, (start, stop))[1]))
                for start, stop in row
            ]
            for row in table
        ]
        total = sum(map(sum, raw))
        return [[w / total if total else 0.0 for w in row] for row in raw]

    # -- forward and backward

    def _begin(self) -> None:
        for held in self.applied.parameters.values():
            held.tensor.grad = None

    def _train_parts(self, parts: list[tuple[Any, Any]], weights: list[float]) -> list[torch.Tensor]:
        """Forward and backward of every microbatch; weighted losses where the last stage is, else nothing."""
        if self.applied.reducer is not None:
            self.applied.reducer.begin(len(parts))
        inputs = [self._stage_inputs(part) for part in parts]
        targets = [(part[1], weight) for part, weight in zip(parts, weights, strict=True)]
        with autocast_for(self.plan, self.world.device):
            if self.plan.pp > 1:
                return self._train_pipeline(inputs, targets, [self._size(part) for part in parts])
            return [
                self._train_one(one, target, last=i == len(inputs) - 1)
                for i, (one, target) in enumerate(zip(inputs, targets, strict=True))
            ]

    def _size(self, part: tuple[Any, Any]) -> int:
        return batches.batch_size(self.job, part)

    def _train_one(self, inputs: dict[str, Any], target: tuple[Any, float], *, last: bool) -> torch.Tensor:
        stage = self.applied.stages[0]
        if self.applied.sharded_by_fsdp:
            stage.set_is_last_backward(last)  # type: ignore[attr-defined]
            if self.plan.zero == 1:
                stage.set_requires_gradient_sync(last)  # type: ignore[attr-defined]
        with nothing_counts(target[1] == 0.0):
            loss = self._loss(stage(**inputs), target)
        with torch.autocast(self.world.device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _train_pipeline(
        self, inputs: list[dict[str, Any]], targets: list[tuple[Any, float]], sizes: list[int]
    ) -> list[torch.Tensor]:
        key = tuple(sizes)
        if key not in self._schedules:
            group = self.world.group("pp")
            assert group is not None
            self._schedules[key] = schedule_for(
                self.plan, self.applied.stages, self.applied.edges, sizes, self.world.device, group, self._loss
            )
        return [loss.detach() for loss in run_pipeline(self._schedules[key], inputs, targets)]

    def _stage_inputs(self, part: tuple[Any, Any]) -> dict[str, Any]:
        leaves = pytree.tree_leaves(part)
        names = [n for n, place in self.applied.program.placeholders.items() if place.kind == "input"]
        return dict(zip(names, leaves, strict=True))

    def _loss(self, outputs: tuple[torch.Tensor, ...], target: tuple[Any, float]) -> torch.Tensor:
        targets, weight = target
        if self.applied.program.has_loss:
            return outputs[0] * weight
        spec = self.applied.program.outputs_spec
        assert spec is not None
        return loss_of(pytree.tree_unflatten(list(outputs), spec), targets, self.job.loss) * weight

    # -- gradients

    def _complete_gradients(self) -> None:
        if self.applied.reducer is not None:
            self.applied.reducer.finish()
        if self.applied.tied.names:
            self.applied.tied.sum_gradients(self.gradients())

    def gradients(self) -> dict[str, torch.Tensor]:
        """This process's share of each parameter's gradient, by name (those that have one)."""
        return {
            name: local_of(held.tensor.grad)
            for name, held in self.applied.parameters.items()
            if held.tensor.grad is not None
        }

    def gradient_norm(self) -> float:
        """The true global norm: every element of every parameter counted once."""
        gradients = self.gradients()
        own = [g for name, g in gradients.items() if self.applied.parameters[name].owns and g.numel()]
        square = torch.zeros((), dtype=torch.float32, device=self.world.device)
        if own:
            square = torch.stack(torch._foreach_norm(own)).float().square().sum()
        if self.world.size > 1:
            dist.all_reduce(square)
        return math.sqrt(float(square))

    def _clip(self) -> None:
        limit = self.job.clip_norm
        if limit is None:
            return
        factor = min(1.0, limit / (self.gradient_norm() + 1e-6))
        gradients = list(self.gradients().values())
        if factor < 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)

    # -- the loss that everyone sees

    def _global_loss(self, losses: list[torch.Tensor]) -> float:
        counts = bool(losses) and self.world.index("tp") == 0
        total = torch.zeros((), dtype=torch.float32, device=self.world.device)
        if counts:
            total = torch.stack([loss.float() for loss in losses]).sum()
        if self.world.size > 1:
            dist.all_reduce(total)
        return float(total)

    def _raise_diverged(self, loss: float) -> None:
        found = ""
        gradients = self.gradients()
        for name, held in self.applied.parameters.items():
            if not bool(torch.isfinite(held.local).all()):
                found = name
            elif name in gradients and not bool(torch.isfinite(gradients[name]).all()):
                found = f"the gradient of {name}"
            if found:
                break
        everyone: list[str] = [found]
        if self.world.size > 1:
            everyone = [""] * self.world.size
            dist.all_gather_object(everyone, found)
        first = next((text for text in everyone if text), "no parameter or gradient: the loss itself overflowed")
        raise DivergedError(
            f"step {self.steps_done + 1}: the loss is {loss}; first not finite: {first}",
            hint="lower the learning rate, set clip_norm, or look at this batch; the last checkpoint is kept",
        )


def refuse_uncaptured(plan: Plan, reason: Exception) -> None:
    """A model that cannot be captured runs under dp and fsdp only.

    Raises:
        PlanError: the plan has another axis.
    """
    if plan.tp * plan.pp > 1 or plan.recompute != "none":
        raise PlanError(f"plan: {plan.spec()} needs the model captured, and that failed\n  {reason}") from None
