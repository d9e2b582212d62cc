"""Proof that serving under a plan gives what the plain model gives in eval mode: every output, on several batch sizes."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from plait.capture import batch as batches
from plait.capture.build import build
from plait.capture.inference import inference_job
from plait.capture.job import Job
from plait.capture.trace import call_model, user_line
from plait.errors import PlaitError, PlanError, TargetError
from plait.run.forward import ForwardRun
from plait.run.log import say_on_stderr
from plait.run.precision import autocast_for
from plait.run.reference import moved, reference_module
from plait.run.room import refuse_too_large
from plait.run.start import start
from plait.run.verify import TOLERANCE
from plait.run.weights import find_checkpoint
from plait.run.world import World, join
from plait.schema import Plan

__all__ = ["ForwardVerdict", "verify_forward"]


@dataclass(frozen=True)
class ForwardVerdict:
    """What was compared, and how far apart it was."""

    ok: bool
    plan: str
    devices: int
    batches: list[int]
    """Samples of the batches compared: the one asked for, and one that the plan does not divide."""
    tolerance: float
    max_output_rel_err: float
    """Over batches and outputs: the largest difference of an element over the largest element."""
    max_output_diff: float
    captured: bool
    outputs: list[dict[str, Any]]
    """Of every output tensor: name, shape at the first batch, rel_err, max_diff."""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def verify_forward(
    job: Job,
    plan: Plan | str,
    *,
    batch: int | None = None,
    seed: int = 0,
    weights: str | None = None,
    world: World | None = None,
) -> ForwardVerdict:
    """Run the plain model in eval mode (in the first process) and the plan's forward, and compare; the same verdict everywhere.

    Call it in every process of the plan. Weights that start at zero are moved a little, and normalisation statistics are
    those after one training forward, so that nothing is compared where it has no effect; or they are a checkpoint's.

    Raises:
        PlanError: the plan fits neither the processes, nor the batch, nor the model.
    """
    samples = batches.batch_size(job) if batch is None else batch
    bound = Plan.load(plan).bound(batch=samples)
    world = world or join(bound)
    if not isinstance(job.model, nn.Module):
        refuse_too_large(build(job, seed=seed, values=False).module, bound, world, with_reference=True, train=False)
    sizes = [samples, samples - 1] if samples > 1 else [1]
    buffers, expected = _reference(job, bound, sizes, seed, weights, world)
    run = start(
        job, bound, train=False, weights=weights, batch=samples, seed=seed, world=world, change=moved, say=say_on_stderr
    )
    for held in run.applied.buffers.values():
        if held.name in buffers:
            held.local.copy_(held.layout.take(buffers[held.name]))
    notes = list(run.applied.notes)
    rows: dict[str, dict[str, Any]] = {}
    done = []
    for size in sizes:
        try:
            outputs = run.forward(batches.resized(run.job, size)[0])
        except PlanError as problem:
            if size == samples:
                raise
            notes.append(f"a batch of {size} was not compared: {problem.message}")
            continue
        done.append(size)
        _compare(outputs, expected[size], rows)
    return _verdict(run, done, rows, notes)


def _reference(
    job: Job, plan: Plan, sizes: list[int], seed: int, weights: str | None, world: World
) -> tuple[dict[str, torch.Tensor], dict[int, Any]]:
    """The first process's buffers and outputs by batch size, in every process."""
    box: list[Any] = [None, None]
    if world.rank == 0:
        try:
            box[0] = _plain(job, plan, sizes, seed, weights)
        except PlaitError as error:  # the others must hear of it instead of waiting
            box[1] = error
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0][:200]
            box[1] = TargetError(
                f"job: the model itself raises in eval mode: {type(error).__name__}: {text}\n\n  {user_line(error)}"
            )
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]  # type: ignore[no-any-return]


def _plain(
    job: Job, plan: Plan, sizes: list[int], seed: int, weights: str | None
) -> tuple[dict[str, torch.Tensor], dict[int, list[tuple[str, Any]]]]:
    if weights is None:
        module = reference_module(job, seed)
        with torch.no_grad(), suppress(Exception):  # it only makes running statistics less trivial
            call_model(module.train(), batches.resized(job, max(sizes))[0])
    else:
        from plait.run.state import load_whole

        module = load_whole(job, find_checkpoint(Path(weights)))
    module.eval()
    served = inference_job(job, module)
    outputs = {}
    with torch.no_grad(), autocast_for(plan, torch.device("cpu")):
        for size in sizes:
            outputs[size] = _named(call_model(module, batches.resized(served, size)[0]))
    return {name: buffer.clone() for name, buffer in module.named_buffers()}, outputs


def _named(outputs: Any) -> list[tuple[str, Any]]:
    plain = dict(outputs) if hasattr(outputs, "to_tuple") else outputs
    return [(f"outputs{pytree.keystr(path)}", leaf) for path, leaf in pytree.tree_flatten_with_path(plain)[0]]


def _compare(got: Any, expected: list[tuple[str, Any]], rows: dict[str, dict[str, Any]]) -> None:
    mine = _named(got)
    if [name for name, _ in mine] != [name for name, _ in expected]:
        rows["structure"] = {"name": f"the structure: {[n for n, _ in mine]} for {[n for n, _ in expected]}"}
        rows["structure"] |= {"shape": [], "rel_err": float("inf"), "max_diff": float("inf")}
        return
    for (name, value), (_, like) in zip(mine, expected, strict=True):
        if not isinstance(like, torch.Tensor):
            continue
        difference, size = float("inf"), 1.0
        if value.shape == like.shape and value.dtype == like.dtype:
            a, b = (
                t.cpu().double() if not t.is_complex() else torch.view_as_real(t.cpu()).double() for t in (value, like)
            )
            # Where both are the same infinity (a mask), nothing is apart.
            apart = torch.where(a == b, 0.0, (a - b).abs())
            difference = float(apart.max()) if apart.numel() else 0.0
            size = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
        row = rows.setdefault(name, {"name": name, "shape": list(like.shape), "rel_err": 0.0, "max_diff": 0.0})
        relative = difference / size if size else (0.0 if difference == 0 else float("inf"))
        row["rel_err"] = max(row["rel_err"], relative, key=_nan_last)
        row["max_diff"] = max(row["max_diff"], difference, key=_nan_last)


def _nan_last(value: float) -> float:
    return float("inf") if math.isnan(value) else value


def _verdict(run: ForwardRun, sizes: list[int], rows: dict[str, dict[str, Any]], notes: list[str]) -> ForwardVerdict:
    low = {p.dtype for p in run.graph.parameters} & {"bfloat16", "float16"}
    tolerance = TOLERANCE["bf16" if low else run.plan.precision]
    worst = max((row["rel_err"] for row in rows.values()), default=0.0, key=_nan_last)
    return ForwardVerdict(
        ok=worst <= tolerance,
        plan=run.plan.spec(),
        devices=run.plan.devices,
        batches=sizes,
        tolerance=tolerance,
        max_output_rel_err=worst,
        max_output_diff=max((row["max_diff"] for row in rows.values()), default=0.0, key=_nan_last),
        captured=run.captured,
        outputs=sorted(rows.values(), key=lambda row: -_nan_last(row["rel_err"])),
        notes=notes,
    )
