"""Proof that a plan computes what one device computes: losses, gradients, parameters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from plait.capture import batch as batches
from plait.capture.build import build
from plait.capture.job import Job
from plait.capture.trace import user_line
from plait.errors import PlaitError, TargetError
from plait.run.log import say_on_stderr
from plait.run.randomness import NoRandomness, reseed_python
from plait.run.reference import (
    GRADIENT_FLOOR,
    ROUNDING,
    Reference,
    batch_of_step,
    in_float64,
    moved,
    reference_module,
    run_reference,
)
from plait.run.room import refuse_too_large
from plait.run.start import Run, start
from plait.run.world import World, join
from plait.schema import Plan

__all__ = ["TOLERANCE", "Verdict", "verify"]

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Relative error by norm. bf16 has 8 bits of mantissa: sums in another order differ by about 2^-8."""


ILL_CONDITIONED = 2e-6
"""Relative rounding error of one device's gradients from which fp32 cannot tell a wrong plan from a right one at 1e-5."""


@dataclass(frozen=True)
class Verdict:
    """What was compared, and how far apart it was. Relative errors are by norm over each parameter."""

    ok: bool
    plan: str
    devices: int
    steps: int
    batch: int
    tolerance: float
    max_loss_diff: float
    """Over the steps, |plan - one device| / max(1, |one device|)."""
    max_grad_rel_err: float
    max_param_rel_err: float
    captured: bool
    worst: list[dict[str, Any]]
    """The parameters that are furthest off: name, grad_rel_err, param_rel_err."""
    losses: list[float]
    reference_losses: list[float]
    microbatches_on_one_device: int
    unresolved_elements: int
    """Elements left out of the parameters' comparison because their gradient is rounding noise on one device too."""
    parameters: int
    """Parameters compared."""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def verify(
    job: Job, plan: Plan | str, *, steps: int = 3, batch: int | None = None, seed: int = 0, world: World | None = None
) -> Verdict:
    """Run the model on one device (in the first process) and under the plan, and compare; the same verdict everywhere.

    Call it in every process of the plan.

    Raises:
        PlanError: the plan fits neither the processes, nor the batch, nor the model.
    """
    samples = batches.batch_size(job) if batch is None else batch
    bound = Plan.load(plan).bound(batch=samples)
    world = world or join(bound)
    if not isinstance(job.model, torch.nn.Module):
        refuse_too_large(build(job, seed=seed, values=False).module, bound, world, with_reference=True)
    verdict, reference = _compared(job, bound, samples, steps, seed, world)
    if verdict.ok or bound.precision != "fp32" or reference.conditioning < ILL_CONDITIONED:
        return verdict
    # Batch norm over few values, say: a rounding error that flips one ReLU is as large as a wrong plan's. In double
    # precision it is not, and the comparison says which of the two it was.
    try:
        again, _ = _compared(in_float64(job), bound, samples, steps, seed, world)
    except PlaitError:  # the model insists on a dtype
        return verdict
    note = (
        f"in fp32 one device's own gradients are off by {reference.conditioning:.1g} (ill-conditioned), and the plan's by "
        f"{verdict.max_grad_rel_err:.1g}: compared in float64 instead"
    )
    return replace(again, notes=[note, *again.notes])


def _compared(job: Job, bound: Plan, samples: int, steps: int, seed: int, world: World) -> tuple[Verdict, Reference]:
    reference = None
    problem: Exception | None = None
    if world.rank == 0:
        try:
            reference = run_reference(job, reference_module(job, seed), bound, samples, steps, NoRandomness)
        except PlaitError as error:  # the others must hear of it instead of waiting
            problem = error
        except Exception as error:
            problem = TargetError(
                f"job: the model itself raises on one device: {type(error).__name__}: {_first_line(error)}"
                f"\n\n  {user_line(error)}"
            )
    reference = _shared(reference, problem, world)
    reseed_python()
    run = start(job, bound, batch=samples, seed=seed, world=world, change=moved, say=say_on_stderr)
    if not run.captured:  # its forward may draw from Python's or numpy's generator, as one device's does in each part
        run.applied.stages[0].register_forward_pre_hook(lambda *_: reseed_python())
    other_start = _other_start(run, reference)
    losses, gradient_errors = [], {}
    with NoRandomness():
        for step in range(steps):
            losses.append(run.forward_backward(*batch_of_step(job, samples, step)))
            if step == 0:
                gradient_errors = _gradient_errors(run, reference)
            run.update()
    errors = _parameter_errors(run, reference)
    return _verdict(run, reference, bound, samples, losses, gradient_errors, errors, other_start), reference


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _shared(reference: Reference | None, problem: Exception | None, world: World) -> Reference:
    """The first process's reference, in every process."""
    if world.size > 1:
        box: list[Any] = [reference, problem]
        dist.broadcast_object_list(box, src=0)
        reference, problem = box
    if problem is not None:
        raise problem
    assert reference is not None
    return reference


@dataclass
class _Sum:
    """Squares of a difference and of what it is compared with, over this process's share."""

    difference: float = 0.0
    reference: float = 0.0
    count: int = 0
    left_out: int = 0


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.abs().double().square().sum())


def _gradient_errors(run: Run, reference: Reference) -> dict[str, _Sum]:
    gradients = run.gradients()
    errors: dict[str, _Sum] = {}
    for name, held in run.applied.parameters.items():
        expected = reference.gradients.get(name)
        if expected is None and name not in gradients:
            continue
        share = held.layout.take(expected).cpu() if expected is not None else torch.zeros(())
        got = gradients[name].cpu() if name in gradients else torch.zeros_like(share)
        errors[name] = _Sum(_square(got - share), _square(share), got.numel())
    return errors


def _other_start(run: Run, reference: Reference) -> list[str]:
    """Parameters that start from other values than one device's, in any process."""
    own = [
        name
        for name, held in run.applied.parameters.items()
        if not torch.equal(held.local.detach().cpu(), held.layout.take(reference.start[name]).cpu())
    ]
    everyone: list[Any] = [own]
    if run.world.size > 1:
        everyone = [None] * run.world.size
        dist.all_gather_object(everyone, own)
    return sorted({name for names in everyone for name in names})


def _parameter_errors(run: Run, reference: Reference) -> dict[str, _Sum]:
    errors: dict[str, _Sum] = {}
    for name, held in run.applied.parameters.items():
        share, got = held.layout.take(reference.parameters[name]).cpu(), held.local.detach().cpu()
        difference = got - share
        left_out = 0
        if name in reference.resolved:
            mask = held.layout.take(reference.resolved[name])
            left_out = int((~mask).sum())
            difference = difference * mask
        errors[name] = _Sum(_square(difference), _square(share), got.numel(), left_out)
    return errors


def _gathered(own: dict[str, _Sum], run: Run) -> dict[str, _Sum]:
    """Errors of whole parameters: the worst of equal shares, summed over different ones."""
    everyone: list[Any] = [None] * run.world.size
    keys = {name: held.layout.pieces for name, held in run.applied.parameters.items() if name in own}
    mine = {name: (keys[name], total) for name, total in own.items()}
    if run.world.size > 1:
        dist.all_gather_object(everyone, mine)
    else:
        everyone = [mine]
    shares: dict[str, dict[Any, _Sum]] = {}
    for others in everyone:
        for name, (key, total) in others.items():
            known = shares.setdefault(name, {}).get(key)
            if known is None or total.difference > known.difference or math.isnan(total.difference):
                shares[name][key] = total
    return {
        name: _Sum(
            sum(s.difference for s in parts.values()),
            sum(s.reference for s in parts.values()),
            sum(s.count for s in parts.values()),
            sum(s.left_out for s in parts.values()),
        )
        for name, parts in shares.items()
    }


def _relative(total: _Sum, floor: float) -> float:
    size = max(math.sqrt(total.reference), floor)
    if size == 0.0:
        return 0.0 if total.difference == 0.0 else math.inf
    return math.sqrt(total.difference) / size


def _verdict(
    run: Run,
    reference: Reference,
    plan: Plan,
    samples: int,
    losses: list[float],
    own_gradients: dict[str, _Sum],
    own_parameters: dict[str, _Sum],
    other_start: list[str],
) -> Verdict:
    floor = GRADIENT_FLOOR * reference.gradient_rms
    low = {p.dtype for p in run.graph.parameters} & {"bfloat16", "float16"}
    tolerance = TOLERANCE["bf16" if low else plan.precision]
    gradients = {
        n: _relative(s, max(floor * math.sqrt(s.count), ROUNDING / tolerance * reference.rounding.get(n, 0.0)))
        for n, s in _gathered(own_gradients, run).items()
    }
    sums = _gathered(own_parameters, run)
    parameters = {n: _relative(s, ROUNDING / tolerance * reference.drift.get(n, 0.0)) for n, s in sums.items()}
    missing = sorted(set(reference.gradients) - set(gradients))
    loss_diff = max(
        abs(a - b) / max(1.0, abs(b), ROUNDING / tolerance * drift)
        for a, b, drift in zip(losses, reference.losses, reference.loss_drift, strict=True)
    )
    names = sorted(parameters, key=lambda n: (n not in other_start, -_key(max(gradients.get(n, 0.0), parameters[n]))))
    worst = [{"name": n, "grad_rel_err": gradients.get(n, 0.0), "param_rel_err": parameters[n]} for n in names[:5]]
    grad_err, param_err = max(gradients.values(), default=0.0), max(parameters.values(), default=0.0)
    ok = not missing and not other_start and all(_within(e, tolerance) for e in (loss_diff, grad_err, param_err))
    return Verdict(
        ok=ok,
        plan=plan.spec(),
        devices=plan.devices,
        steps=len(losses),
        batch=samples,
        tolerance=tolerance,
        max_loss_diff=loss_diff,
        max_grad_rel_err=grad_err,
        max_param_rel_err=param_err,
        captured=run.captured,
        worst=worst,
        losses=losses,
        reference_losses=reference.losses,
        microbatches_on_one_device=reference.cut_into,
        unresolved_elements=sum(s.left_out for s in sums.values()),
        parameters=len(parameters),
        notes=_notes(run, reference, missing, other_start, ok, tolerance),
    )


def _key(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _within(error: float, tolerance: float) -> bool:
    return not math.isnan(error) and error <= tolerance


def _notes(
    run: Run, reference: Reference, missing: list[str], other_start: list[str], ok: bool, tolerance: float
) -> list[str]:
    notes = list(run.applied.notes)
    if tolerance > TOLERANCE[run.plan.precision]:
        notes.append(f"the model's own parameters are bfloat16 or float16: the tolerance is {tolerance:g}")
    if reference.cut_into > 1:
        notes.append(
            f"the model's result depends on how a batch is cut (batch norm, or a batch-wide loss): one device "
            f"accumulated the same {reference.cut_into} microbatches"
        )
    if other_start:
        notes.append(f"other values than one device's before the first step: {', '.join(other_start[:5])}")
    if missing:
        notes.append(f"no gradient arrived at: {', '.join(missing[:5])}")
    first = reference.losses[0]
    apart = abs(reference.part_loss - first)
    if not ok and apart > 10 * tolerance * max(1.0, abs(first)) and not run.has_batch_norm:
        notes.append(
            f"the loss is no weighted mean of its parts: over the parts of this plan it is {reference.part_loss:.6g}, "
            f"over the batch {first:.6g}; use fewer replicas and microbatches, or set loss_weight in the Job"
        )
    return notes
