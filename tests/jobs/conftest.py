"""A project folder with one small target, as the working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

TARGET = """\
import torch
from torch import nn

import plait


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.Tanh())))

    def forward(self, x):
        return self.layers(x)


def job(rate=1e-2):
    generator = torch.Generator().manual_seed(0)
    batch = tuple(torch.randn(16, 8, generator=generator) for _ in range(2))
    return plait.Job(
        Net, loss=nn.functional.mse_loss, optimizer=lambda named: torch.optim.AdamW(named, rate), batch=batch
    )
"""

# The last rank dies once, before its third step, as a node does that loses power.
FRAGILE = """\
import os
from pathlib import Path

import tiny


class Batches:
    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        for number in range(8):
            last = int(os.environ.get("WORLD_SIZE", "0")) - 1
            if os.environ.get("RANK") == str(last) and last > 0 and number == 2 and not Path("died").exists():
                Path("died").touch()
                os._exit(9)
            yield self.batch


def job():
    made = tiny.job()
    made.data = Batches(made.batch)
    return made
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with tiny.py in it."""
    (tmp_path / "tiny.py").write_text(TARGET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def fragile(project: Path) -> Path:
    """The working directory, with fragile.py: tiny.py's job, whose last rank dies once under a launcher."""
    (project / "fragile.py").write_text(FRAGILE, encoding="utf-8")
    return project
