"""Small models that tests export."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import plait


class Mlp(nn.Module):
    """Two layers whose biases start at zero, as many a network's do."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 4)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(F.gelu(self.up(x))))


class Tagger(nn.Module):
    """Tokens in, a dict out, with a None and a nested tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, object]:
        states = torch.tanh(self.mix(self.table(tokens)))
        return {"logits": self.head(states) * mask[..., None], "cache": None, "last": (states.sum(1), states[:, -1])}


def mlp_job(width: int = 32, data: bool = False) -> plait.Job:
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randn(6, 16, generator=generator), torch.randint(4, (6,), generator=generator))
    return plait.Job(lambda: Mlp(width), loss=F.cross_entropy, batch=batch, data=[batch] if data else None, name="mlp")


def tagger_batch(samples: int = 4, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(20, (samples, length), generator=generator), torch.ones(samples, length)
