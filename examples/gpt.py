"""A byte-level GPT on the source text of Python's own standard library.

    plait train  "examples/gpt.py:job" --devices 4 --plan dp=2,pp=2 --steps 120 --batch 16
    plait verify "examples/gpt.py:job?layers=4&width=64&length=32" --devices 4 --plan dp=2,pp=2

With its defaults it has about 10 million parameters.
"""

import torch
from torch import nn
from torch.nn import functional as F

import plait
from plait.run.data import Windows, standard_library_text, unigram_entropy


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(self, layers, width, heads, length, dropout):
        super().__init__()
        self.length = length
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens):
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def generate(model, prompt="def ", tokens=240, temperature=0.7, seed=0):
    """Text that the model writes after `prompt`, one byte at a time."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    text = torch.tensor([list(prompt.encode())], device=device)
    model.eval()
    for _ in range(tokens):
        logits = model(text[:, -model.length :])[0, -1] / temperature
        text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1, generator=generator)[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def job(layers=6, width=384, heads=0, length=128, dropout=0.0, lr=1e-3, warmup=20):
    text = standard_library_text()
    windows = Windows(text[: -64 * length], length)
    return plait.Job(
        lambda: GPT(layers, width, heads or max(1, width // 64), length, dropout),
        loss=loss,
        optimizer=lambda named: torch.optim.AdamW(named, lr, betas=(0.9, 0.95), weight_decay=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / warmup)),
        clip_norm=1.0,
        batch=tuple(torch.stack(part) for part in zip(*(windows[i] for i in range(16)), strict=True)),
        data=windows,
        evaluate=Windows(text[-64 * length :], length),
        generate=lambda model: (
            f"unigram entropy of the text: {unigram_entropy(text):.4g} nats a byte\n\n{generate(model)}"
        ),
        name="gpt",
    )
