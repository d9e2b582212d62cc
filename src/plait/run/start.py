"""`start`: a job under a plan, as a Run whose `step` trains one global batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree

from plait.capture import batch as batches
from plait.capture.build import build
from plait.capture.inference import inference_job
from plait.capture.job import Job
from plait.capture.trace import loss_of, trace
from plait.errors import CaptureError, DivergedError, PlanError
from plait.run.apply import Applied, Held, apply, check, local_of
from plait.run.batchnorm import nothing_counts
from plait.run.evaluate import losses_of_parts
from plait.run.forward import ForwardRun
from plait.run.optimizers import check_elementwise, default_optimizer
from plait.run.own_modules import apply_own_modules, refuse_uncaptured
from plait.run.pipeline import run_pipeline, schedule_for
from plait.run.precision import autocast_for
from plait.run.processes import settle_under_launcher
from plait.run.room import refuse_too_large
from plait.run.shares import shares
from plait.run.weights import load_weights
from plait.run.world import World, join
from plait.schema import Graph, Plan

__all__ = ["Run", "start"]


_Change = Callable[[str, torch.Tensor], torch.Tensor]
_Say = Callable[[str], None]


@overload
def start(
    job: Job,
    plan: Plan | str | Path,
    *,
    train: Literal[True] = True,
    weights: str | Path | None = None,
    batch: int | None = None,
    seed: int = 0,
    world: World | None = None,
    change: _Change | None = None,
    say: _Say | None = None,
) -> Run: ...


@overload
def start(
    job: Job,
    plan: Plan | str | Path,
    *,
    train: Literal[False],
    weights: str | Path | None = None,
    batch: int | None = None,
    seed: int = 0,
    world: World | None = None,
    change: _Change | None = None,
    say: _Say | None = None,
) -> ForwardRun: ...


def start(
    job: Job,
    plan: Plan | str | Path,
    *,
    train: bool = True,
    weights: str | Path | None = None,
    batch: int | None = None,
    seed: int = 0,
    world: World | None = None,
    change: _Change | None = None,
    say: _Say | None = None,
) -> Run | ForwardRun:
    """The job under a plan (a Plan, a SPEC text or a file's path), ready to step, in every process of the plan.

    `train=False`: ready for `forward(inputs)` only, in eval mode, without gradients, optimizer or loss.
    `weights`: a run directory (its newest checkpoint) or a checkpoint, of any plan, to take the weights from.
    `batch` is the usual global batch in samples (the job's sample batch if None); other sizes may follow.
    `change(name, value)` may alter initial values; `say(text)` is told of what takes long, in the first process.

    Raises:
        PlanError: the plan fits neither the processes, nor the batch, nor the model.
        CaptureError: the model cannot be captured and the plan needs it to be.
        CheckpointError: there is no checkpoint in `weights`, or it is broken or of another model.
    """
    size = batches.batch_size(job) if batch is None else batch
    bound = Plan.load(plan).bound(batch=size)
    if not train:
        # Nothing is recomputed without a backward, and a zero-bubble schedule would gather FSDP's shards for one.
        schedule = "gpipe" if bound.schedule == "zerobubble" else bound.schedule
        bound = replace(bound, recompute="none", recompute_segments=None, schedule=schedule)
        settle_under_launcher()
    world = world or join(bound)
    if not isinstance(job.model, torch.nn.Module):
        refuse_too_large(build(job, seed=seed, values=False).module, bound, world, train=train)
    built = build(job, seed=seed, values=True)
    if not train:
        job = inference_job(job, built.module)
    if change is not None:
        built = built.changed(change)
    table = shares(size, bound.microbatches, bound.replicas, bound.batch_shares)
    part = max(1, *(stop - start for row in table for start, stop in row))
    try:
        program = trace(job, module=built.module, batch=part, say=say if world.rank == 0 else None, train=train)
    except CaptureError as reason:
        refuse_uncaptured(bound, reason)
        applied = apply_own_modules(job, built, bound, world, part, reason, train=train)
    else:
        assert program.graph is not None
        check(bound, program.graph)
        applied = apply(program, built, bound, world)
        # Microbatches of another size than the first are refused now if ever, in every process alike.
        for other in sorted({stop - start for row in table for start, stop in row if stop > start}, reverse=True):
            applied.program_for(other)
    # Replicas draw different random numbers; processes that share a sample (tp) the same ones.
    torch.manual_seed(seed * 1_000_003 + world.replica * 1009 + world.index("pp") + 1)
    if weights is not None:
        load_weights(Path(weights), applied)
    if not train:
        return ForwardRun(job, applied)
    run = Run(job, applied, _named(built.module, applied))
    run.state_names = [name for name in built.module.state_dict() if name not in applied.program.aliases]
    return run


def _named(module: torch.nn.Module, applied: Applied) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what this process holds, in the user's order."""
    held = []
    for name, _ in module.named_parameters():
        if name in applied.parameters:
            tensor = applied.parameters[name].tensor
            assert isinstance(tensor, torch.nn.Parameter)
            held.append((name, tensor))
    return held


def _optimizer(job: Job, applied: Applied, named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer | None:
    """The user's optimizer over this process's share; None where it holds no parameter.

    Raises:
        PlanError: the optimizer looks across what this plan splits; names it and the parameter.
    """
    factory = job.optimizer or default_optimizer
    optimizer = factory(named) if named else None
    if type(optimizer) in _ELEMENTWISE:
        return optimizer
    plan = applied.plan
    shapes = {p.name: p.shape for p in _graph(applied).parameters if p.trainable}
    verdict = check_elementwise(factory, shapes)
    split = [n for n in verdict.whole if plan.fsdp > 1 or (n in applied.split_by_tp)]
    right = verdict.is_right(parameters_split=bool(split), model_split=plan.pp > 1)
    if verdict.needs_closure or not right:
        reason = verdict.sentence or f"{verdict.name} asks for a closure"
        raise PlanError(
            f"plan: {plan.spec()} cannot run this optimizer: {reason}",
            hint="use an element-wise optimizer (SGD, Adam, ...), or a plan of dp only"
            + ("" if verdict.needs_closure else " (and pp, if it looks at one parameter at a time)"),
        )
    return optimizer


def _graph(applied: Applied) -> Graph:
    assert applied.program.graph is not None
    return applied.program.graph


_ELEMENTWISE = {
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
}
"""torch's own classes whose every step is element by element; anything else is tried (`check_elementwise`)."""


class Run:
    """The plan under way in this process."""

    def __init__(self, job: Job, applied: Applied, named: list[tuple[str, torch.nn.Parameter]]) -> None:
        self.job = job
        self.applied = applied
        self.plan = applied.plan
        self.world = applied.world
        self.steps_done = 0
        self.captured = applied.captured
        self.state_names: list[str] = []
        """Names of the whole model's state, in the user's order, tied ones once."""
        self.optimizer = _optimizer(job, applied, named)
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

    def step(self, inputs: Any, targets: Any, *, share_of: int | None = None) -> float:
        """Train one global batch, the same in every process; the global mean loss, in every process.

        `share_of`: inputs and targets are only this process's share (see `data.Batches`) of so many samples.

        Raises:
            DivergedError: the loss is not finite; names the first parameter that is not. Nothing was stepped.
        """
        loss = self.forward_backward(inputs, targets, share_of=share_of)
        self.update()
        return loss

    def forward_backward(self, inputs: Any, targets: Any, *, share_of: int | None = None) -> float:
        """The global mean loss; gradients are complete and clipped, nothing is stepped yet."""
        parts, weights = self._parts((inputs, targets), share_of)
        self._begin()
        losses = self._train_parts(parts, weights)
        self._complete_gradients()
        loss = self._global_loss(losses)
        if not math.isfinite(loss):
            self._raise_diverged(loss)
        self._clip()
        return loss

    def evaluate(self, inputs: Any, targets: Any, *, share_of: int | None = None) -> float:
        """The global mean loss of a batch in eval mode (dropout off, running statistics); nothing is changed."""
        parts, weights = self._parts((inputs, targets), share_of)
        targets_of = [(part[1], weight) for part, weight in zip(parts, weights, strict=True)]
        sizes = [self._size(part) for part in parts]
        return self._global_loss(losses_of_parts(self, [self._stage_inputs(p) for p in parts], targets_of, sizes))

    def update(self) -> None:
        """Step the optimizer and the learning-rate scheduler."""
        if self.optimizer is not None:
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps_done += 1

    @property
    def graph(self) -> Graph:
        """The captured model's record."""
        return _graph(self.applied)

    @property
    def tokens_per_sample(self) -> int:
        """Positions of a sample that a rate in tokens counts; 1 without a sequence."""
        return self.graph.tokens_per_sample

    @property
    def learning_rate(self) -> float | None:
        """Of the first parameter group that this process holds."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer is not None else None

    @property
    def reached(self) -> set[str]:
        """Parameters that get gradients."""
        places = self.applied.program.placeholders.values()
        return {p.name for p in places if p.kind == "parameter" and p.trainable and p.reached}

    @property
    def used_names(self) -> set[str]:
        """Parameters and buffers that the graph takes, on whichever process."""
        return self.applied.used_names

    def held(self) -> list[Held]:
        """Parameters and buffers as this process holds them (constants of the graph are no state)."""
        return self.applied.held()

    @property
    def has_batch_norm(self) -> bool:
        """Whether the captured model normalises over the batch."""
        target = torch.ops.aten.batch_norm.default
        return any(node.target is target and node.args[5] for node in self.applied.program.module.graph.nodes)

    # -- the parts of a batch

    def _parts(self, batch: tuple[Any, Any], share_of: int | None = None) -> tuple[list[tuple[Any, Any]], list[float]]:
        """This process's microbatches, and each one's weight in the step's loss (0 for a stand-in)."""
        size = batches.batch_size(self.job, batch) if share_of is None else share_of
        count = min(self.plan.microbatches, size)
        table = shares(size, count, self.plan.replicas, self.plan.batch_shares)
        mine = [row[self.world.replica] for row in table]
        bounds = mine if share_of is None else _from_zero(mine)
        held = size if share_of is None else batches.batch_size(self.job, batch)
        parts = []
        for start, stop in bounds:
            # An empty share still takes part in every collective: a stand-in with a weight of zero.
            low = min(start, held - 1)
            part = batches.split(self.job, batch, (low, max(stop, low + 1)))
            parts.append(batches.map_batch(self.job, part, lambda leaf, _: leaf.to(self.world.device)))
        if self.job.loss_weight is None:
            return parts, [(stop - start) / size for start, stop in mine]
        own = [
            0.0 if start == stop else batches.weight_of(self.job, part) or 0.0
            for part, (start, stop) in zip(parts, mine, strict=True)
        ]
        total = torch.tensor(sum(own), dtype=torch.float64)
        if self.world.samples is not None:
            total = total.to(self.world.device)
            dist.all_reduce(total, group=self.world.samples)
        return parts, [w / float(total) if total else 0.0 for w in own]

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
        if isinstance(stage, FSDPModule):
            stage.set_is_last_backward(last)
            if self.plan.zero == 1:
                stage.set_requires_gradient_sync(last)
        with nothing_counts(target[1] == 0.0):
            loss = self.loss_of_outputs(stage(**inputs), target)
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
                self.plan,
                self.applied.stages,
                [self.applied.edges_for(n) for n in sizes],
                sizes,
                self.world.device,
                group,
                self.loss_of_outputs,
            )
        return [loss.detach() for loss in run_pipeline(self._schedules[key], inputs, targets)]

    def _stage_inputs(self, part: tuple[Any, Any]) -> dict[str, Any]:
        size = self._size(part)
        places = self.applied.program_for(size).placeholders
        names = [n for n, place in places.items() if place.kind == "input"]
        return {**dict(zip(names, pytree.tree_leaves(part), strict=True)), "samples": size}

    def loss_of_outputs(self, outputs: tuple[torch.Tensor, ...], target: tuple[Any, float]) -> torch.Tensor:
        """One part's loss times its weight, from what the last stage gave."""
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
        if self.applied.after_backward is not None:
            self.applied.after_backward()
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


def _from_zero(bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same lengths, one after the other from 0: where they lie in this process's own share."""
    result, begin = [], 0
    for start, stop in bounds:
        result.append((begin, begin + stop - start))
        begin += stop - start
    return result
