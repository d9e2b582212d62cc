"""What one device computes: the unmodified model, for comparison."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from plait.capture import batch as batches
from plait.capture.job import Job
from plait.capture.trace import call_model, loss_of, tied_names
from plait.run.precision import autocast_for
from plait.run.randomness import reseed_python
from plait.run.shares import shares
from plait.schema import Plan

__all__ = ["GRADIENT_FLOOR", "ROUNDING", "Reference", "batch_of_step", "in_float64", "moved", "run_reference"]

ROUNDING = 10.0
"""Times one device's own rounding (see `Reference.rounding`) that a gradient may be off whatever its size."""

GRADIENT_FLOOR = 1e-2
"""Share of the global root-mean-square gradient under which a parameter's gradient is judged by absolute error.

Some gradients are zero in exact arithmetic (a bias in front of a softmax or a norm); what is left of them is rounding,
about 1e-7 of the terms that cancelled, and has no relative error to speak of."""

UNRESOLVED = 1e-4
"""An element whose gradient is under this share of its parameter's (floored) root-mean-square is rounding noise as far
as a normalising optimizer (Adam) can tell: its step of full size has a random sign. Such elements are left out of the
comparison of parameters after the last step, and counted."""


UNSURE = 1e-3
"""An element whose gradient's own rounding error on one device is more than this share of it is unresolved as well."""


@dataclass
class Reference:
    """One device's results, by the parameters' first names."""

    start: dict[str, torch.Tensor]
    """Parameters before the first step."""
    cut_into: int
    """Microbatches that one device accumulated: 1 unless the model's result depends on the cut."""
    part_loss: float
    """The first step's loss as the weighted mean over every microbatch's and replica's part, computed one by one."""
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """At the first step, after clipping; parameters that got one."""
    gradient_rms: float = 0.0
    """Root mean square over all elements of all gradients at the first step."""
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    """After the last step."""
    resolved: dict[str, torch.Tensor] = field(default_factory=dict)
    """bool masks: elements whose gradient stood above rounding at every step."""
    rounding: dict[str, float] = field(default_factory=dict)
    """Norm of one device's own rounding error in the first step's gradients, against float64."""
    drift: dict[str, float] = field(default_factory=dict)
    """The same of the parameters after the last step: large where training is ill-conditioned (batch norm over few
    values), so that no two ways of summing agree."""
    loss_drift: list[float] = field(default_factory=list)
    """The same of each step's loss."""

    @property
    def conditioning(self) -> float:
        """Relative rounding error of all gradients at the first step: about 3e-7 in fp32 where nothing amplifies it."""
        size = sum(float(g.abs().double().square().sum()) for g in self.gradients.values()) ** 0.5
        return float(sum(r**2 for r in self.rounding.values()) ** 0.5 / size) if size else 0.0


def in_float64(job: Job) -> Job:
    """The job with its model and batch in double precision."""

    def build() -> nn.Module:
        return (copy.deepcopy(job.model) if isinstance(job.model, nn.Module) else job.model()).double()

    return replace(job, model=build, batch=batches.map_batch(job, job.batch, _in_float64))


def moved(name: str, value: torch.Tensor) -> torch.Tensor:
    """A parameter that starts at zero (wholly, or in its rows) moved a little, the same way everywhere.

    Otherwise what multiplies it would pass unseen: zero times anything is zero.
    """
    if not value.is_floating_point() or value.numel() == 0 or bool((value != 0).float().mean() > 0.9):
        return value
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.dtype) * 0.02
    return torch.where(value == 0, noise, value)


def batch_of_step(job: Job, samples: int, step: int) -> tuple[Any, Any]:
    """The sample batch at `samples`, its samples rotated by one place a step, so that parts meet other processes."""
    whole = batches.resized(job, samples)
    return batches.map_batch(job, whole, lambda leaf, dim: leaf if dim is None else leaf.roll(step, dim))


def run_reference(
    job: Job, module: nn.Module, plan: Plan, samples: int, steps: int, quiet: Callable[[], AbstractContextManager[Any]]
) -> Reference:
    """Train `module` (a copy that may be changed) for `steps` on one device.

    `quiet()` is the context in which randomness is off.
    """
    first = batch_of_step(job, samples, 0)
    table = shares(samples, min(plan.microbatches, samples), plan.replicas, plan.batch_shares)
    rows = [(row[0][0], row[-1][1]) for row in table]
    every = [part for row in table for part in row]
    whole_loss = _loss_only(job, module, plan, first, [(0, samples)], quiet)
    cut_loss = _loss_only(job, module, plan, first, rows, quiet)
    try:
        part_loss = _loss_only(job, module, plan, first, every, quiet)
    except Exception:  # one replica's part alone may be too small (batch norm over a single sample); it only explains
        part_loss = math.nan
    depends = abs(whole_loss - cut_loss) > 1e-5 * max(1.0, abs(whole_loss)) or (
        len(rows) > 1 and _gradients_differ(_Course(job, plan, samples, 1, [], quiet), module, [(0, samples)], rows)
    )
    bounds = rows if depends else [(0, samples)]

    aliases = tied_names(module)
    start = {aliases.get(n, n): p.detach().clone() for n, p in module.named_parameters()}
    course = _Course(job, plan, samples, steps, bounds, quiet)
    other = copy.deepcopy(module).double()
    own, exact = course.train(module), course.train(other, _in_float64)
    result = Reference(start=start, cut_into=len(bounds), part_loss=part_loss)
    for step in range(steps):
        loss, gradients = next(own)
        try:
            exact_loss, exact_gradients = next(exact)
        except Exception:  # some models insist on a dtype; exactly, the order of samples makes no difference either
            if step:
                raise
            other = _with_values(module, start, aliases)
            exact = course.train(other, _reversed)
            exact_loss, exact_gradients = next(exact)
        result.losses.append(loss)
        result.loss_drift.append(abs(loss - exact_loss))
        count = sum(g.numel() for g in gradients.values())
        rms = (sum(float(g.abs().double().square().sum()) for g in gradients.values()) / max(1, count)) ** 0.5
        if step == 0:
            result.gradients = {n: g.detach().clone() for n, g in gradients.items()}
            result.gradient_rms = rms
            result.rounding = {n: _apart(g, exact_gradients.get(n)) for n, g in gradients.items()}
        for name, gradient in gradients.items():
            above = _resolved(gradient, exact_gradients.get(name, gradient), rms)
            result.resolved[name] = result.resolved[name] & above if name in result.resolved else above
    next(own, None), next(exact, None)  # the last optimizer steps
    result.parameters = {aliases.get(n, n): p.detach().clone() for n, p in module.named_parameters()}
    ended = {aliases.get(n, n): p.detach() for n, p in other.named_parameters()}
    result.drift = {n: _apart(p, ended[n], result.resolved.get(n)) for n, p in result.parameters.items()}
    return result


def _resolved(gradient: torch.Tensor, exact: torch.Tensor, rms: float) -> torch.Tensor:
    size = max(float(gradient.abs().double().square().mean().sqrt()), GRADIENT_FLOOR * rms)
    # An exact zero (a row of a table that was not looked up) is no rounding noise.
    large = (gradient.abs() >= UNRESOLVED * size) | (gradient == 0)
    return large & ((gradient - exact).abs() <= UNSURE * gradient.abs())


def _gradients_differ(
    course: _Course, module: nn.Module, one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> bool:
    """Whether the sum of the parts' gradients depends on how a batch is cut; a loss may hide it (batch norm at the start)."""
    found = []
    for bounds in (one, other):
        _, gradients = next(replace(course, bounds=bounds).train(copy.deepcopy(module)))
        found.append(gradients)
    size = sum(float(g.abs().double().square().sum()) for g in found[0].values()) ** 0.5
    apart = sum(_apart(g, found[1].get(n)) ** 2 for n, g in found[0].items()) ** 0.5
    return bool(apart > 1e-4 * size)


def _apart(value: torch.Tensor, other: torch.Tensor | None, mask: torch.Tensor | None = None) -> float:
    if other is None:
        return 0.0
    difference = value - other
    return float((difference if mask is None else difference * mask).abs().double().norm())


_Change = Callable[[torch.Tensor, int | None], torch.Tensor]


def _unchanged(leaf: torch.Tensor, _dim: int | None) -> torch.Tensor:
    return leaf


def _in_float64(leaf: torch.Tensor, _dim: int | None) -> torch.Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf


def _reversed(leaf: torch.Tensor, dim: int | None) -> torch.Tensor:
    return leaf if dim is None else leaf.flip(dim)


def _with_values(module: nn.Module, values: dict[str, torch.Tensor], aliases: dict[str, str]) -> nn.Module:
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[aliases.get(name, name)])
    return module


@dataclass
class _Course:
    """Some steps of training on one device."""

    job: Job
    plan: Plan
    samples: int
    steps: int
    bounds: list[tuple[int, int]]
    quiet: Callable[[], AbstractContextManager[Any]]

    def train(self, module: nn.Module, change: _Change = _unchanged) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
        """Each step's loss and gradients, each microbatch's tensors changed by `change`; steps when asked for the next."""
        job = self.job
        aliases = tied_names(module)
        named = [(n, p) for n, p in module.named_parameters()]
        optimizer = job.optimizer(named) if job.optimizer is not None else torch.optim.AdamW(named, lr=1e-3)
        scheduler = job.scheduler(optimizer) if job.scheduler is not None else None
        for step in range(self.steps):
            optimizer.zero_grad()
            loss = self._accumulate(module, batch_of_step(job, self.samples, step), change)
            if job.clip_norm is not None:
                nn.utils.clip_grad_norm_(module.parameters(), job.clip_norm)
            yield loss, {aliases.get(n, n): p.grad for n, p in named if p.grad is not None}
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

    def _accumulate(self, module: nn.Module, batch: tuple[Any, Any], change: _Change) -> float:
        total = 0.0
        for weight, bound in zip(_weights(self.job, batch, self.bounds), self.bounds, strict=True):
            part = batches.map_batch(self.job, batches.split(self.job, batch, bound), change)
            with self.quiet():
                loss = _part_loss(self.job, module, self.plan, part) * weight
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total


def _weights(job: Job, batch: tuple[Any, Any], bounds: list[tuple[int, int]]) -> list[float]:
    counted = [batches.weight_of(job, batches.split(job, batch, bound)) for bound in bounds]
    raw = [float(stop - start) if own is None else own for own, (start, stop) in zip(counted, bounds, strict=True)]
    total = sum(raw)
    return [w / total if total else 0.0 for w in raw]


def _part_loss(job: Job, module: nn.Module, plan: Plan, part: tuple[Any, Any]) -> torch.Tensor:
    reseed_python()
    with autocast_for(plan, torch.device("cpu")):
        return loss_of(call_model(module, part[0]), part[1], job.loss)


def _loss_only(
    job: Job,
    module: nn.Module,
    plan: Plan,
    batch: tuple[Any, Any],
    bounds: list[tuple[int, int]],
    quiet: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Weighted mean loss over the parts, leaving the module as it was."""
    bounds = [b for b in bounds if b[0] < b[1]]
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    with torch.no_grad(), quiet():
        total = sum(
            w * float(_part_loss(job, module, plan, batches.split(job, batch, b)))
            for w, b in zip(_weights(job, batch, bounds), bounds, strict=True)
        )
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    return total


def reference_module(job: Job, seed: int) -> nn.Module:
    """The unmodified model, whole, its zero weights moved."""
    if isinstance(job.model, nn.Module):
        module = copy.deepcopy(job.model)
    else:
        torch.manual_seed(seed)
        module = job.model()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(moved(name, parameter))
    return module
