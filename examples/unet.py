"""A U-Net takes noise out of images of circles.

    plait train  examples/unet.py:job --devices 2 --plan dp=2 --steps 200
    plait verify examples/unet.py:job --devices 2 --plan pp=2

What the way down hands to the way up crosses every stage in between.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import plait


def convolutions(before, after):
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1),
        nn.GroupNorm(4, after),
        nn.SiLU(),
        nn.Conv2d(after, after, 3, padding=1),
        nn.GroupNorm(4, after),
        nn.SiLU(),
    )


class UNet(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.first = convolutions(1, widths[0])
        self.down = nn.ModuleList(convolutions(a, b) for a, b in pairwise(widths))
        self.widen = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(convolutions(2 * a, a) for a in widths[:-1])
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, images):
        kept = [self.first(images)]
        for down in self.down:
            kept.append(down(F.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for widen, up in zip(reversed(self.widen), reversed(self.up), strict=True):
            x = up(torch.cat([widen(x), kept.pop()], dim=1))
        return self.last(x)


class Circles(Dataset):
    def __init__(self, samples, size, noise, seed):
        generator = torch.Generator().manual_seed(seed)
        centre = torch.rand(samples, 2, 1, 1, generator=generator) * size
        radius = (torch.rand(samples, 1, 1, generator=generator) * 0.3 + 0.1) * size
        axis = torch.arange(size)
        distance = ((axis[None, :, None] - centre[:, 0]) ** 2 + (axis[None, None, :] - centre[:, 1]) ** 2).sqrt()
        self.clean = (distance < radius).float()[:, None]
        self.noisy = self.clean + noise * torch.randn(self.clean.shape, generator=generator)

    def __len__(self):
        return len(self.clean)

    def __getitem__(self, index):
        return self.noisy[index], self.clean[index]


def job(width=8, depth=2, size=16, noise=0.5, samples=1024, lr=2e-3, seed=0):
    circles = Circles(samples, size, noise, seed)
    return plait.Job(
        lambda: UNet(width, depth),
        loss=F.mse_loss,
        optimizer=lambda named: torch.optim.AdamW(named, lr),
        batch=(circles.noisy[:16], circles.clean[:16]),
        data=circles,
        name="unet",
    )
