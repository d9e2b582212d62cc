"""What the training tests run inside the worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import plait
from plait.errors import PlaitError
from plait.run.start import start
from plait.run.train import TrainOptions, train
from plait.schema import Plan

SAMPLES = 22


def net(width: int = 16, dropout: float = 0.0) -> nn.Module:
    """A chain that cuts into several segments."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def data(width: int = 16) -> TensorDataset:
    """Samples that a batch of eight does not divide."""
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(SAMPLES, width, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)
    )


def job(width: int = 16, dropout: float = 0.0, rate: float = 1e-2, **options: Any) -> plait.Job:
    """Cross entropy on the samples above."""
    samples = data(width)
    return plait.Job(
        lambda: net(width, dropout),
        loss=nn.functional.cross_entropy,
        optimizer=lambda named: torch.optim.AdamW(named, rate),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        batch=samples[:8],
        data=samples,
        **options,
    )


def trained(plan: str, folder: str, options: dict[str, Any], job_options: dict[str, Any]) -> dict[str, Any]:
    """The summary of a training, or the error's text under "error"."""
    try:
        bound = Plan.parse(plan)
        return train(job(**job_options), bound, TrainOptions(run_dir=Path(folder), quiet=True, batch=8, **options))
    except PlaitError as problem:
        return {"error": str(problem), "kind": type(problem).__name__}


def poisoned(plan: str, folder: str) -> dict[str, Any]:
    """A training whose data turn infinite after two steps."""
    good = data()[:8]
    bad = (good[0] * float("inf"), good[1])
    try:
        bound = Plan.parse(plan)
        one = job()
        one.data = [good, good, bad, good]
        return train(one, bound, TrainOptions(run_dir=Path(folder), quiet=True, steps=4, checkpoint_every=1))
    except PlaitError as problem:
        return {"error": str(problem), "kind": type(problem).__name__}


def dropped(plan: str) -> list[float]:
    """The mean that dropout leaves of equal inputs in this process, four times."""
    one = plait.Job(
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)),
        loss=lambda outputs, targets: outputs.mean(),
        batch=(torch.ones(8, 8), torch.zeros(8)),
    )
    run = start(one, plan, seed=5)
    parts, _ = run._parts(one.batch)
    stage = run.applied.stages[0]
    return [float(stage(**run._stage_inputs(part))[0]) for part in parts for _ in range(4)]


def optimizer_refused(plan: str, name: str) -> str:
    """The error that an optimizer meets under a plan; empty where it runs."""
    classes: dict[str, Any] = {
        "adafactor": lambda named: torch.optim.Adafactor([p for _, p in named], lr=1e-3),
        "muon": lambda named: torch.optim.Muon([p for _, p in named if p.dim() == 2], lr=1e-3),
        "lbfgs": lambda named: torch.optim.LBFGS([p for _, p in named]),
        "sgd": lambda named: torch.optim.SGD([p for _, p in named], lr=1e-2, momentum=0.9),
    }
    one = job()
    one.optimizer = classes[name]
    try:
        with start(one, plan) as run:
            run.step(*one.batch)
    except PlaitError as problem:
        return str(problem)
    return ""
