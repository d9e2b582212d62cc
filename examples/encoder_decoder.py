"""torch's own nn.Transformer learns to write a row of symbols backwards.

    plait train  examples/encoder_decoder.py:job --devices 2 --plan pp=2 --steps 300
    plait verify examples/encoder_decoder.py:job --devices 4 --plan dp=2,pp=2

The encoder's output is used by every layer of the decoder: a tensor that lives over several pipeline stages.
"""

import torch
from torch import nn

import plait


class Translator(nn.Module):
    def __init__(self, symbols, layers, width, heads, length):
        super().__init__()
        self.source, self.target = nn.Embedding(symbols, width), nn.Embedding(symbols, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.1)
        self.transformer = nn.Transformer(width, heads, layers, layers, 4 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, symbols)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, source, target):
        x = self.transformer(
            self.source(source) + self.place, self.target(target) + self.place, tgt_mask=self.mask, tgt_is_causal=True
        )
        return self.head(x)


def loss(logits, targets):
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def job(symbols=32, layers=2, width=64, heads=4, length=12, samples=4096, lr=1e-3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(1, symbols, (samples, length), generator=generator)
    answer = source.flip(1)
    shifted = torch.cat([torch.zeros_like(answer[:, :1]), answer[:, :-1]], dim=1)  # symbol 0 begins

    return plait.Job(
        lambda: Translator(symbols, layers, width, heads, length),
        loss=loss,
        optimizer=lambda named: torch.optim.AdamW(named, lr),
        batch=((source[:32], shifted[:32]), answer[:32]),
        data=[((a, b), c) for a, b, c in zip(source.split(32), shifted.split(32), answer.split(32), strict=True)],
        name="encoder_decoder",
    )
