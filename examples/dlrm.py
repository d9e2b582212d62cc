"""A recommender in the manner of DLRM: embedding tables for categories, MLPs for numbers, products between them.

    plait train  examples/dlrm.py:job --devices 2 --plan tp=2 --steps 200    # tables split over devices
    plait verify examples/dlrm.py:job --devices 2 --plan tp=2

The clicks are synthetic: a hidden table of tastes decides how likely each is. Source of the architecture: Naumov et al.
(2019), Deep Learning Recommendation Model.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import plait


class DLRM(nn.Module):
    def __init__(self, tables, rows, numbers, width):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(numbers, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 4 * width), nn.ReLU(), nn.Linear(4 * width, 1))
        self.register_buffer("pairs", torch.combinations(torch.arange(tables + 1)).T.contiguous(), persistent=False)

    def forward(self, categories, numbers):
        dense = self.bottom(numbers)
        vectors = torch.stack([dense, *(table(categories[:, i]) for i, table in enumerate(self.tables))], dim=1)
        products = vectors @ vectors.transpose(1, 2)
        return self.top(torch.cat([dense, products[:, self.pairs[0], self.pairs[1]]], dim=1))[:, 0]


class Clicks(Dataset):
    """Each sample is made from its index alone, so that every process sees the same ones."""

    def __init__(self, samples, tables, rows, numbers, seed):
        generator = torch.Generator().manual_seed(seed)
        taste = torch.randn(tables, rows, generator=generator)
        self.categories = torch.randint(rows, (samples, tables), generator=generator)
        self.numbers = torch.randn(samples, numbers, generator=generator)
        score = taste[torch.arange(tables), self.categories].mean(dim=1) * 2 + self.numbers[:, 0]
        self.clicks = (torch.rand(samples, generator=generator) < score.sigmoid()).float()

    def __len__(self):
        return len(self.clicks)

    def __getitem__(self, index):
        return (self.categories[index], self.numbers[index]), self.clicks[index]


def job(tables=8, rows=1000, numbers=4, width=16, samples=20_000, lr=1e-2, seed=0):
    clicks = Clicks(samples, tables, rows, numbers, seed)
    return plait.Job(
        lambda: DLRM(tables, rows, numbers, width),
        loss=F.binary_cross_entropy_with_logits,
        optimizer=lambda named: torch.optim.Adagrad(named, lr),
        batch=((clicks.categories[:64], clicks.numbers[:64]), clicks.clicks[:64]),
        data=clicks,
        name="dlrm",
    )
