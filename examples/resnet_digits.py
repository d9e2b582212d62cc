"""A small ResNet with BatchNorm on scikit-learn's digits.

    plait train  examples/resnet_digits.py:job --devices 2 --plan dp=2 --steps 200
    plait verify examples/resnet_digits.py:job --devices 4 --plan dp=2,pp=2

BatchNorm sees the whole microbatch of all replicas: what one device sees that accumulates the same microbatches.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import plait


class Residual(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.skip = nn.Identity()
        if stride > 1 or before != after:
            self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        return torch.relu(self.main(x) + self.skip(x))


class ResNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images):
        return self.head(self.body(self.stem(images)).mean(dim=(2, 3)))


def job(width=16, lr=0.05):
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)

    return plait.Job(
        lambda: ResNet(width),
        loss=nn.functional.cross_entropy,
        optimizer=lambda named: torch.optim.SGD(named, lr, momentum=0.9),
        batch=(images[:32], labels[:32]),
        data=TensorDataset(images[:1500], labels[:1500]),
        evaluate=TensorDataset(images[1500:], labels[1500:]),
        name="resnet",
    )
