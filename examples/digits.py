"""The two-layer network fc1 -> relu -> fc2 on scikit-learn's digits, three ways.

    plait train examples/digits.py:job --devices 2 --plan dp=2 --steps 200        # data parallel
    plait train examples/digits.py:job --devices 2 --plan pp=2 --steps 200        # each layer on its own device
    plait train examples/digits.py:job --devices 4 --plan dp=2,pp=2 --steps 200   # both

The model is the same in all three; how it is spread is the plan's business.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import plait


class Net(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.fc1 = nn.Linear(64, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def job(hidden=128, lr=1e-2):
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)

    return plait.Job(
        lambda: Net(hidden),
        loss=nn.functional.cross_entropy,
        optimizer=lambda named: torch.optim.AdamW(named, lr),
        batch=(images[:32], labels[:32]),
        data=TensorDataset(images[:1500], labels[:1500]),
        evaluate=TensorDataset(images[1500:], labels[1500:]),
        name="digits",
    )
