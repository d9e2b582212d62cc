"""Training under a plan, as `plait train` does it: data, progress, log, evaluation, checkpoints, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plait.capture import batch as batches
from plait.capture.job import Job
from plait.errors import CheckpointError
from plait.run import checkpoint
from plait.run.data import Batch, Batches
from plait.run.log import Log, say_on_stderr
from plait.run.meter import Meter, tensor_bytes
from plait.run.start import Run, start
from plait.run.state import restore, run_shards, run_state, whole_names
from plait.schema import Plan

__all__ = ["TrainOptions", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `plait train` is told beside target and plan."""

    run_dir: Path
    steps: int | None = None
    """Optimizer steps; None: one epoch, or 100 where the source has no length."""
    batch: int | None = None
    """Global batch in samples; None: the job's sample batch."""
    seed: int = 0
    resume: bool = False
    eval_every: int | None = None
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = None
    keep: int = 2
    log_every: int = 1
    quiet: bool = False
    measure: bool = False
    """Also measure the bytes held in tensors, during the second step, which it slows down."""


def train(job: Job, plan: Plan, options: TrainOptions) -> dict[str, Any]:
    """Train the job; the same summary in every process. Call it in every process of the plan.

    Raises:
        DivergedError: the loss is not finite; the last checkpoint is kept.
        CheckpointError: what there is to resume from is broken or of another model.
    """
    size = options.batch or batches.batch_size(job)
    run = start(job, plan, batch=size, seed=options.seed, say=say_on_stderr)
    source, from_sample = _source(job, run, size, options.seed)
    total = options.steps or source.steps_per_epoch or 100
    with Log(options.run_dir, first=run.world.rank == 0, quiet=options.quiet, append=options.resume) as log:
        for note in run.applied.notes:
            log.say(note)
        if from_sample:
            log.say("the job has no data: training on its sample batch")
        best = _resume(run, source, options, log)
        summary = _loop(run, source, total, size, options, log)
        summary.update(best)
    summary["sample"] = _sample(run, job, options)
    return summary


def _source(job: Job, run: Run, size: int, seed: int) -> tuple[Batches, bool]:
    data = job.data
    if data is None:
        data = [batches.resized(job, size)]
    source = Batches(
        data,
        batch=size,
        seed=seed,
        index=run.world.replica,
        count=run.plan.replicas,
        microbatches=run.plan.microbatches,
        weights=run.plan.batch_shares,
    )
    return source, job.data is None


def _resume(run: Run, source: Batches, options: TrainOptions, log: Log) -> dict[str, Any]:
    if not options.resume:
        return {}
    newest = checkpoint.latest(options.run_dir)
    if newest is None:
        log.say(f"nothing to resume from in {options.run_dir}: starting at step 1")
        return {"resumed_from": None}
    restored = checkpoint.load(newest, run_shards(run))
    restore(run, restored)
    position = restored.state.get("position")
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise CheckpointError(f"checkpoint {newest}: it has no position in the data")
    source.position = (int(position[0]), int(position[1]))
    log.say(f"resuming from {newest} after step {run.steps_done}")
    return {"resumed_from": run.steps_done}


def _loop(run: Run, source: Batches, total: int, size: int, options: TrainOptions, log: Log) -> dict[str, Any]:
    tokens_per_sample = run.tokens_per_sample
    losses: list[float] = []
    meter = Meter()
    evaluations: list[dict[str, float]] = []
    begin = last_save = time.monotonic()
    samples_seen = 0
    saved_at = -1
    log.begin(total, run.steps_done)
    for batch in _until(source, run, total):
        step_begin = time.monotonic()
        loss = _measured_step(run, batch, meter, weigh=options.measure and len(losses) == 1)
        samples = batch.samples or batches.batch_size(run.job, (batch.inputs, batch.targets))
        seconds = time.monotonic() - step_begin
        samples_seen += samples
        losses.append(loss)
        if run.steps_done % options.log_every == 0 or run.steps_done == total:
            log.step(run.steps_done, loss, samples / seconds, samples * tokens_per_sample / seconds, run.learning_rate)
        else:
            log.advance(run.steps_done)
        if options.eval_every and run.steps_done % options.eval_every == 0:
            evaluations.append(_evaluate(run, size, options.seed, log))
        if _save_due(run, options, last_save):
            _save(run, source, options)
            saved_at, last_save = run.steps_done, time.monotonic()
    if saved_at != run.steps_done:
        _save(run, source, options)
    seconds = time.monotonic() - begin
    if run.job.evaluate is not None and (not evaluations or evaluations[-1]["step"] != run.steps_done):
        evaluations.append(_evaluate(run, size, options.seed, log))
    return {
        "steps": run.steps_done,
        "loss": losses[-1] if losses else None,
        "first_loss": losses[0] if losses else None,
        "evaluation_loss": evaluations[-1]["loss"] if evaluations else None,
        "samples_per_s": samples_seen / seconds if losses else None,
        "tokens_per_s": samples_seen * tokens_per_sample / seconds if losses else None,
        "seconds": seconds,
        "plan": run.plan.spec(),
        "devices": run.plan.devices,
        "batch": size,
        "parameters": sum(p.numel for p in run.graph.parameters),
        "captured": run.captured,
        "run_dir": str(options.run_dir),
        "measured": meter.summary(run.world, size * tokens_per_sample),
        "losses": losses,
        "evaluations": evaluations,
    }


def _measured_step(run: Run, batch: Batch, meter: Meter, *, weigh: bool) -> float:
    share_of = batch.samples if batch.is_share else None

    def forward_backward() -> float:
        return run.forward_backward(batch.inputs, batch.targets, share_of=share_of)

    if not weigh:
        return meter.step(forward_backward, run.update)

    def note(peak: int) -> None:
        meter.peak_memory = peak

    with tensor_bytes(note):
        return meter.step(forward_backward, run.update)


def _until(source: Batches, run: Run, total: int) -> Iterator[Batch]:
    if run.steps_done >= total:
        return
    for batch in source:
        yield batch
        if run.steps_done >= total:
            return


def _save_due(run: Run, options: TrainOptions, last_save: float) -> bool:
    if options.checkpoint_every and run.steps_done % options.checkpoint_every == 0:
        return True
    if options.checkpoint_minutes is None:
        return False
    # Clocks differ between processes: the first one's decides.
    due = torch.tensor(float(time.monotonic() - last_save >= options.checkpoint_minutes * 60))
    if run.world.size > 1:
        due = due.to(run.world.device)
        dist.broadcast(due, src=0)
    return bool(due)


def _save(run: Run, source: Batches, options: TrainOptions) -> None:
    shared, own = run_state(run)
    checkpoint.save(
        options.run_dir,
        run.steps_done,
        run_shards(run),
        state={**shared, "position": list(source.position)},
        rank_state=own,
        model=whole_names(run),
        aliases=run.applied.program.aliases,
        keep=options.keep,
    )


def _evaluate(run: Run, size: int, seed: int, log: Log) -> dict[str, float]:
    """Mean loss over the held-out batches, each weighted by its samples."""
    held_out = run.job.evaluate if run.job.evaluate is not None else [batches.resized(run.job, size)]
    source = Batches(
        held_out,
        batch=size,
        seed=seed,
        index=run.world.replica,
        count=run.plan.replicas,
        microbatches=run.plan.microbatches,
        weights=run.plan.batch_shares,
        shuffle=False,
    )
    total, count = 0.0, 0
    for batch in source.one_epoch():
        samples = batch.samples or batches.batch_size(run.job, (batch.inputs, batch.targets))
        loss = run.evaluate(batch.inputs, batch.targets, share_of=batch.samples if batch.is_share else None)
        total, count = total + loss * samples, count + samples
    loss = total / count if count else math.nan
    log.evaluation(run.steps_done, loss)
    return {"step": run.steps_done, "loss": loss}


def _sample(run: Run, job: Job, options: TrainOptions) -> str | None:
    """What the job's `generate` makes of the trained model, built whole in the first process."""
    if job.generate is None or run.world.rank != 0:
        return None
    newest = checkpoint.latest(options.run_dir)
    if newest is None:
        return None
    from plait.run.state import load_whole

    return str(job.generate(load_whole(job, newest)))
