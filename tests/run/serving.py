"""What the processes of the tests of serving under a plan do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import plait
from plait.capture.target import load_target
from plait.errors import PlaitError
from plait.run.start import start
from plait.run.train import TrainOptions, train
from plait.run.verify_forward import verify_forward


def forward_verdict(target: str, plan: str, batch: int | None) -> dict[str, Any] | str:
    """The verdict of `verify --forward`, or the refusal's text."""
    try:
        return verify_forward(load_target(target), plan, batch=batch).to_dict()
    except PlaitError as problem:
        return str(problem)


class Structured(nn.Module):
    """Several outputs: nested, an input given back, a parameter, a flattened one, None and a number, and one dtype more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        """Of x [samples, 8]."""
        hidden = self.drop(self.norm(self.first(x)).relu())
        scores = self.second(hidden) * self.scale
        return {
            "scores": scores,
            "nested": (hidden, [scores.argmax(-1), scores > 0]),
            "flat": hidden.reshape(-1, 8),
            "input": x,
            "scale": self.scale,
            "none": None,
            "number": 7,
        }


class Together(nn.Module):
    """An output that compares the samples of a batch with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[samples, samples]."""
        y = self.second(self.first(x).relu())
        return y @ y.T


def structured(kind: str = "Structured") -> plait.Job:
    """A job of one of the above."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 8, generator=generator)
    return plait.Job({"Structured": Structured, "Together": Together}[kind], batch=(inputs, torch.zeros(6)), loss=_loss)


def _loss(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    value = outputs["scores"] if isinstance(outputs, dict) else outputs
    return value.square().mean() + targets.mean()


def outputs_of(plan: str, sizes: list[int], to: str) -> list[Any]:
    """The outputs of `structured` for batches of several sizes, and whether training is refused."""
    job = structured()
    with start(job, plan, train=False) as run:
        given = [run.forward(torch.arange(8.0 * n).reshape(n, 8) / 9, to=to) for n in sizes]  # type: ignore[arg-type]
        assert all(not p.tensor.requires_grad for p in run.applied.parameters.values())
        try:
            run.step(job.batch[0], job.batch[1])
        except PlaitError as problem:
            return [*given, str(problem)]
    return given


def trained_then_served(target: str, folder: str, trained: str | None, served: str) -> Any:
    """Train two steps under one plan (or not), and compare serving from the run directory under another."""
    try:
        if trained is not None:
            from pathlib import Path

            train(load_target(target), trained, TrainOptions(run_dir=Path(folder), steps=2, quiet=True))  # type: ignore[arg-type]
            return None
        return verify_forward(load_target(target), served, weights=folder).to_dict()
    except PlaitError as problem:
        return str(problem)


def refused(what: str) -> str:
    """The message for inputs that do not fit."""
    run = start(structured(), "dp=1", train=False)
    inputs = {
        "width": torch.zeros(2, 9),
        "dtype": torch.zeros(2, 8, dtype=torch.float64),
        "kind": [1, 2],
        "empty": torch.zeros(0, 8),
    }[what]
    try:
        run.forward(inputs)
    except PlaitError as problem:
        return str(problem)
    return "nothing was refused"
