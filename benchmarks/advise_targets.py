"""Targets of benchmarks/advise.py that no transformers architecture gives."""

import sys
from pathlib import Path

import torch
from torch import nn

import plait

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def recommender(tables=26, rows=15_000_000, width=64):
    """DLRM with 26 tables of 15 million rows: 100 GB of embeddings in fp32. Its clicks are random."""
    from dlrm import DLRM

    categories, numbers = torch.randint(rows, (64, tables)), torch.randn(64, 13)
    return plait.Job(
        lambda: DLRM(tables, rows, 13, width),
        loss=nn.functional.binary_cross_entropy_with_logits,
        optimizer=lambda named: torch.optim.Adagrad(named, 1e-2),
        batch=((categories, numbers), torch.rand(64).round()),
        name="recommender",
    )


def small(width=1792, classes=10):
    """A network of ten million parameters."""

    def build():
        return nn.Sequential(
            nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width - 400), nn.ReLU(), nn.Linear(width - 400, classes),
        )  # fmt: skip

    return plait.Job(
        build,
        loss=nn.functional.cross_entropy,
        optimizer=lambda named: torch.optim.AdamW([p for _, p in named], 1e-3),
        batch=(torch.randn(64, 784), torch.randint(classes, (64,))),
        name="small",
    )
