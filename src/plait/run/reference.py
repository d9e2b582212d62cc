"""What one device computes: the unmodified model, for comparison."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
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

__all__ = ["GRADIENT_FLOOR", "ROUNDING", "Reference", "batch_of_step", "moved", "run_reference"]

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


@dataclass
class Reference:
    """One device's results, by the parameters' first names."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    """At the first step, after clipping; parameters that got one."""
    start: dict[str, torch.Tensor]
    """Parameters before the first step."""
    parameters: dict[str, torch.Tensor]
    """After the last step."""
    resolved: dict[str, torch.Tensor]
    """bool masks: elements whose gradient stood above rounding at every step."""
    rounding: dict[str, float]
    """Norm of what the first step's gradients differ by when one device takes the same samples in reverse order."""
    gradient_rms: float
    """Root mean square over all elements of all gradients at the first step."""
    cut_into: int
    """Microbatches that one device accumulated: 1 unless the model's result depends on the cut."""
    part_loss: float
    """The first step's loss as the weighted mean over every microbatch's and replica's part, computed one by one."""


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
    table = shares(samples, min(plan.microbatches, samples), plan.replicas)
    rows = [(row[0][0], row[-1][1]) for row in table]
    every = [part for row in table for part in row]
    whole_loss = _loss_only(job, module, plan, first, [(0, samples)], quiet)
    cut_loss = _loss_only(job, module, plan, first, rows, quiet)
    try:
        part_loss = _loss_only(job, module, plan, first, every, quiet)
    except Exception:  # one replica's part alone may be too small (batch norm over a single sample); it only explains
        part_loss = math.nan
    depends = abs(whole_loss - cut_loss) > 1e-5 * max(1.0, abs(whole_loss))
    bounds = rows if depends else [(0, samples)]

    aliases = tied_names(module)
    start = {aliases.get(n, n): p.detach().clone() for n, p in module.named_parameters()}
    rounding = _rounding(job, module, plan, first, bounds, quiet)
    named = [(n, p) for n, p in module.named_parameters()]
    optimizer = job.optimizer(named) if job.optimizer is not None else torch.optim.AdamW(named, lr=1e-3)
    scheduler = job.scheduler(optimizer) if job.scheduler is not None else None
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    resolved: dict[str, torch.Tensor] = {}
    rms = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(_accumulate(job, module, plan, batch_of_step(job, samples, step), bounds, quiet))
        if job.clip_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), job.clip_norm)
        now = {aliases.get(n, n): p.grad for n, p in named if p.grad is not None}
        if step == 0:
            gradients = {n: g.detach().clone() for n, g in now.items()}
        count = sum(g.numel() for g in now.values())
        rms_now = (sum(float(g.abs().double().square().sum()) for g in now.values()) / max(1, count)) ** 0.5
        rms = rms_now if step == 0 else rms
        for name, gradient in now.items():
            size = max(float(gradient.abs().double().square().mean().sqrt()), GRADIENT_FLOOR * rms_now)
            # An exact zero (a row of a table that was not looked up) is no rounding noise.
            above = (gradient.abs() >= UNRESOLVED * size) | (gradient == 0)
            resolved[name] = above if name not in resolved else resolved[name] & above
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    parameters = {aliases.get(n, n): p.detach().clone() for n, p in named}
    return Reference(losses, gradients, start, parameters, resolved, rounding, rms, len(bounds), part_loss)


def _rounding(
    job: Job,
    module: nn.Module,
    plan: Plan,
    batch: tuple[Any, Any],
    bounds: list[tuple[int, int]],
    quiet: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """For each parameter, the norm of the difference between gradients summed in two orders of the samples.

    Exactly, the order does not matter, so this is the rounding of one device alone. Leaves the module as it was.
    """

    def reverse(leaf: torch.Tensor, dim: int | None) -> torch.Tensor:
        if dim is None:
            return leaf
        # Within each microbatch: across them the model may tell the order (batch norm).
        order = [i for start, stop in bounds for i in reversed(range(start, stop))]
        return leaf.index_select(dim, torch.tensor(order))

    named = dict(module.named_parameters())
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    found = []
    for one in (batch, batches.map_batch(job, batch, reverse)):
        module.zero_grad()
        _accumulate(job, module, plan, one, bounds, quiet)
        found.append({n: p.grad.detach() for n, p in named.items() if p.grad is not None})
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
    module.zero_grad()
    aliases = tied_names(module)
    factor = _clip_factor(job, found[0])
    return {aliases.get(n, n): factor * float((g - found[1][n]).abs().double().norm()) for n, g in found[0].items()}


def _clip_factor(job: Job, gradients: dict[str, torch.Tensor]) -> float:
    norm = sum(float(g.abs().double().square().sum()) for g in gradients.values()) ** 0.5
    return 1.0 if job.clip_norm is None else min(1.0, job.clip_norm / (norm + 1e-6))


def _weights(job: Job, batch: tuple[Any, Any], bounds: list[tuple[int, int]]) -> list[float]:
    function = job.loss_weight
    raw = [
        float(stop - start) if function is None else float(function(batches.split(job, batch, (start, stop))[1]))
        for start, stop in bounds
    ]
    total = sum(raw)
    return [w / total if total else 0.0 for w in raw]


def _part_loss(job: Job, module: nn.Module, plan: Plan, part: tuple[Any, Any]) -> torch.Tensor:
    reseed_python()
    with autocast_for(plan, torch.device("cpu")):
        return loss_of(call_model(module, part[0]), part[1], job.loss)


def _accumulate(
    job: Job,
    module: nn.Module,
    plan: Plan,
    batch: tuple[Any, Any],
    bounds: list[tuple[int, int]],
    quiet: Callable[[], AbstractContextManager[Any]],
) -> float:
    total = 0.0
    for weight, bound in zip(_weights(job, batch, bounds), bounds, strict=True):
        with quiet():
            loss = _part_loss(job, module, plan, batches.split(job, batch, bound)) * weight
            loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


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
