"""Keras models of every kind trained as Keras trains them, and under plans."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("keras")
import keras_models
import torch
from keras import layers
from proving import verdicts

import plait
from plait.capture.trace import call_model, loss_of

if TYPE_CHECKING:
    from plait.run.processes import Workers


@pytest.mark.parametrize("kind", keras_models.KINDS)
def test_losses_are_those_of_fit(kind: str):
    """Five steps of a plain torch loop on the Job against Keras' train_on_batch, within 1e-5."""
    model, (inputs, targets) = keras_models.KINDS[kind]()
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Dropout):
            layer.rate = 0.0
    job = plait.from_keras(model, batch=(inputs, targets))
    module = copy.deepcopy(job.model)
    optimizer = job.optimizer([(n, p) for n, p in module.named_parameters() if p.requires_grad])
    scheduler = job.scheduler(optimizer) if job.scheduler else None
    ours, kerass = [], []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(call_model(module, job.batch[0]), job.batch[1], job.loss)
        loss.backward()
        if job.clip_norm:
            torch.nn.utils.clip_grad_norm_(module.parameters(), job.clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        ours.append(loss.item())
    for _ in range(5):
        given = [list(part) if isinstance(part, tuple) else part for part in (inputs, targets)]
        found = model.train_on_batch(*given)
        kerass.append(float(found[0] if isinstance(found, list | tuple) else found))

    assert ours == pytest.approx(kerass, abs=1e-5)


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "plans"),
    [("sequential", ("dp=2",)), ("subclass", ("pp=2,microbatches=2", "tp=2")), ("functional", ("dp=2",))],
)
def test_plans_compute_the_same(workers: Workers, kind: str, plans: tuple[str, ...]):
    """`verify` holds, batch norm over replicas included."""
    path = Path(keras_models.__file__)
    for plan, verdict in workers.call(verdicts, f"{path}:job?kind={kind}", plans)[0].items():
        assert verdict.ok, (plan, verdict)
        assert verdict.captured
