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


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with tiny.py in it."""
    (tmp_path / "tiny.py").write_text(TARGET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
