"""The task's loss from a runtime's outputs: what a lower precision costs on the user's own data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from plait.capture.trace import call_model, loss_of, user_line
from plait.serve.accuracy import difference
from plait.serve.prepare import Prepared
from plait.serve.source import Source, eval_mode

__all__ = ["accuracy_on_data", "task_loss"]

Loss = Callable[[Any, Any], torch.Tensor]


def task_loss(source: Source) -> Loss | None:
    """loss(outputs, targets) without the model; None where the outputs alone do not give the model's own loss.

    A model that computes its loss itself is asked for it once, with its labels, and the usual forms of it are tried on the
    outputs: the first that gives the same number is taken.
    """
    if source.job.loss is not None:
        return lambda outputs, targets: loss_of(outputs, targets, source.job.loss)
    inputs, targets = source.job.batch
    if not source.label:
        return None
    with eval_mode(source.module):
        whole = call_model(source.module, inputs)
        outputs = call_model(source.module, source.served(source.job.batch))
    try:
        want = float(loss_of(whole, targets, None))
    except Exception:  # no loss at all: nothing to compare with
        return None
    for form in _forms(source.module):
        with suppress(Exception):  # a form that does not take these outputs is not the one
            if abs(float(form(outputs, targets)) - want) <= 1e-5 * max(abs(want), 1.0):
                return form
    return None


def _forms(module: Any) -> Iterator[Loss]:
    def first(outputs: Any) -> Any:
        return next(iter(dict(outputs).values())) if hasattr(outputs, "keys") else outputs[0]

    own = getattr(module, "loss_function", None)
    if own is not None:
        size = getattr(getattr(module, "config", None), "vocab_size", None)
        yield lambda outputs, targets: own(logits=first(outputs), labels=targets, vocab_size=size)
    yield lambda outputs, targets: F.cross_entropy(first(outputs).flatten(0, -2), targets.flatten())
    yield lambda outputs, targets: F.cross_entropy(first(outputs)[:, :-1].flatten(0, -2), targets[:, 1:].flatten())
    yield lambda outputs, targets: F.mse_loss(first(outputs), targets)


def accuracy_on_data(prepared: Prepared, loss: Loss | None, folder: Path) -> dict[str, Any] | None:
    """Differences and losses over the batches that a child ran; None where it ran none.

    The loss is the mean over the batches, each weighing the same.
    """
    from safetensors.torch import load_file

    subject = prepared.subject
    entry = subject.entries["forward"]
    gaps, eager_losses, losses, wrong = [], [], [], ""
    for sample, (_, targets) in zip(entry.data, prepared.data, strict=True):
        path = folder / f"got-{sample.file}"
        if not path.is_file():
            continue
        held = load_file(path)
        path.unlink()
        got, want = [held[s.name] for s in entry.outputs], subject.outputs(sample)
        gaps.append(difference([s.name for s in entry.outputs], want, got))
        if loss is not None and not wrong:
            try:
                with torch.no_grad():
                    eager_losses.append(float(loss(prepared.flat.unflatten_outputs(want), targets)))
                    losses.append(float(loss(prepared.flat.unflatten_outputs(got), targets)))
            except Exception as problem:  # the user's own function
                where = user_line(problem)
                wrong = f"the job's loss raised {type(problem).__name__}: {problem}{f', at {where}' if where else ''}"[
                    :500
                ]
    if not gaps:
        return None
    tops = [gap.top1 for gap in gaps if gap.top1 is not None]
    losses = [] if wrong else losses
    return {
        "batches": len(gaps),
        **({"loss_error": wrong} if wrong else {}),
        "max_abs": max(gap.max_abs for gap in gaps),
        "mean_abs": sum(gap.mean_abs for gap in gaps) / len(gaps),
        "max_rel": max(gap.max_rel for gap in gaps),
        "cosine": min(gap.cosine for gap in gaps),
        "top1": sum(tops) / len(tops) if tops else None,
        "loss_fp32": sum(eager_losses) / len(eager_losses) if losses else None,
        "loss": sum(losses) / len(losses) if losses else None,
    }
