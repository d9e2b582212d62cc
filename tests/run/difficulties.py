"""Small models with one difficulty each, as targets: `tests/run/difficulties.py:tied`."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from plait import Job

WIDTH = 16


def _sgd(named):
    return torch.optim.SGD(named, 0.1, momentum=0.9)


def _job(build, inputs=None, targets=None, loss=None, samples=8, **more):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, WIDTH, generator=generator) if inputs is None else inputs
    targets = torch.randint(0, 4, (samples,), generator=generator) if targets is None else targets
    return Job(build, loss=loss or F.cross_entropy, batch=(inputs, targets), **{"optimizer": _sgd, **more})


def _tokens(samples=8, length=6, vocabulary=20):
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(2))


def _images(samples=8, channels=3, size=8):
    return torch.randn(samples, channels, size, size, generator=torch.Generator().manual_seed(3))


class Chain(nn.Module):
    """Linear layers with an activation in between."""

    def __init__(self, *sizes, act=torch.relu):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.act = act

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


def chain():
    return _job(lambda: Chain(WIDTH, 32, 32, 4))


def module_given():
    """A module instead of a function."""
    torch.manual_seed(3)
    return _job(Chain(WIDTH, 32, 4))


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self, vocabulary=20):
        super().__init__()
        self.table = nn.Embedding(vocabulary, WIDTH)
        self.mix = Chain(WIDTH, 32, WIDTH, 32, WIDTH)
        self.out = nn.Linear(WIDTH, vocabulary, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        return self.out(self.mix(self.table(tokens)))


def _token_loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def tied():
    return _job(Tied, _tokens(), _tokens().roll(1, 1), _token_loss)


class Twice(nn.Module):
    """One layer at three places, one weight used raw as well."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = torch.tanh(self.shared(torch.tanh(self.first(x))))
        x = torch.tanh(self.shared(x)) + x @ self.shared.weight
        return self.last(torch.tanh(self.shared(x)))


def tied_on_one_process():
    """One weight in the first and the third of four virtual stages: both are on the first process."""

    def build():
        model = Chain(*[WIDTH] * 9, 4, act=torch.tanh)
        model.layers[5].weight = model.layers[0].weight
        return model

    return _job(build)


def twice():
    return _job(Twice)


def frozen():
    def build():
        model = Chain(WIDTH, 32, 32, 4)
        model.layers[0].requires_grad_(False)
        model.layers[1].bias.requires_grad_(False)
        return model

    return _job(build)


def frozen_all_but_last():
    def build():
        model = Chain(WIDTH, 32, 32, 4)
        model.layers[:2].requires_grad_(False)
        return model

    return _job(build)


class Unused(Chain):
    """Parameters that the loss does not reach: one never called, one whose result is dropped."""

    def __init__(self):
        super().__init__(WIDTH, 32, 32, 4)
        self.never = nn.Linear(3, 3)
        self.dropped = nn.Linear(WIDTH, 2)

    def forward(self, x):
        self.dropped(x)
        return super().forward(x)


def unused():
    return _job(Unused)


class Counting(nn.Module):
    """Buffers that the forward writes: a 0-dim counter, a running mean."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Chain(WIDTH, 32, WIDTH), nn.Linear(WIDTH, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.seen.add_(1.0)
        return self.head(self.body(x) * self.scale)


def counting():
    return _job(Counting)


def batchnorm(dropout="0"):
    p = float(dropout)

    def build():
        layers = [
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(p),
            nn.Conv2d(8, 8, 3, padding=1),
        ]
        return nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))

    return _job(build, _images())


def batchnorm1d():
    return _job(
        lambda: nn.Sequential(
            nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)
        )
    )


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(
            [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
        )
        self.up = nn.ModuleList([nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)])
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        a = torch.relu(self.down[0](x))
        b = torch.relu(self.down[1](F.max_pool2d(a, 2)))
        c = torch.relu(self.down[2](F.max_pool2d(b, 2)))
        b = torch.relu(self.up[0](torch.cat([F.interpolate(c, scale_factor=2), b], 1)))
        a = torch.relu(self.up[1](torch.cat([F.interpolate(b, scale_factor=2), a], 1)))
        return self.out(a)


def skips():
    return _job(Skips, _images(), _images().flip(0), F.mse_loss)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.table = nn.Embedding(20, WIDTH)
        self.rnn = getattr(nn, kind)(WIDTH, WIDTH, num_layers=2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(WIDTH, 20)

    def forward(self, tokens):
        return self.out(self.rnn(self.table(tokens))[0])


def recurrent(kind="LSTM"):
    return _job(lambda: Recurrent(kind), _tokens(), _tokens().roll(1, 1), _token_loss)


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, WIDTH)
        self.core = nn.Transformer(WIDTH, 2, 2, 2, 32, batch_first=True)
        self.out = nn.Linear(WIDTH, 20)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.out(self.core(self.table(source), self.table(target), tgt_mask=mask, tgt_is_causal=True))


def transformer():
    return _job(Translator, (_tokens(), _tokens().roll(1, 1)), _tokens(), _token_loss)


def encoder():
    def build():
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        return nn.Sequential(nn.Embedding(20, WIDTH), nn.TransformerEncoder(layer, 3), nn.Linear(WIDTH, 20))

    return _job(build, _tokens(), _tokens().roll(1, 1), _token_loss)


def weight_norm():
    def build():
        model = Chain(WIDTH, 32, 32, 4)
        for layer in model.layers:
            parametrizations.weight_norm(layer)
        return model

    return _job(build)


def spectral_norm():
    def build():
        model = Chain(WIDTH, 32, 32, 4)
        parametrizations.spectral_norm(model.layers[1])
        return model

    return _job(build)


def orthogonal():
    def build():
        model = Chain(WIDTH, WIDTH, WIDTH, 4)
        parametrizations.orthogonal(model.layers[1])
        return model

    return _job(build)


class Named(nn.Module):
    """Keyword arguments of several kinds; outputs in a dict with its own loss."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(WIDTH, 32), nn.Linear(4, 32), nn.Linear(32, 4)

    def forward(self, x, extra=None, positions=None, flag=True, scale=2, labels=None):
        hidden = self.left(x["dense"])
        if extra is not None:
            hidden = hidden + self.right(extra[0])
        if positions is not None and flag:
            hidden = hidden + positions
        logits = self.head(torch.relu(hidden) * scale)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits, "nothing": None}


def keywords():
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": {"dense": torch.randn(8, WIDTH, generator=generator)},
        "extra": (torch.randn(8, 4, generator=generator), None),
        "positions": torch.randn(32, generator=generator),
        "flag": True,
        "scale": 3,
        "labels": torch.randint(0, 4, (8,), generator=generator),
    }
    return Job(Named, batch=(inputs, None), batch_dim={"positions": None}, optimizer=_sgd)


class SequenceFirst(nn.Module):
    """Inputs whose batch dimension is the second."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(WIDTH, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.out(self.rnn(x)[0][-1])


def sequence_first():
    return _job(SequenceFirst, torch.randn(5, 8, WIDTH, generator=torch.Generator().manual_seed(1)), batch_dim=1)


def _ignoring(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100)


def ignored(weighted="yes"):
    """A mean over the tokens that count, which are not equally many in each part."""
    targets = _tokens().roll(1, 1)
    for row in range(8):
        targets[row, : row % 5] = -100
    weight = (lambda t: (t != -100).sum()) if weighted == "yes" else None
    return _job(Tied, _tokens(), targets, _ignoring, loss_weight=weight)


def _contrastive(outputs, targets):
    outputs = F.normalize(outputs, dim=-1)
    return F.cross_entropy(outputs @ outputs.T / 0.1, torch.arange(outputs.shape[0]))


def contrastive():
    return _job(lambda: Chain(WIDTH, 32, 32, 8), loss=_contrastive)


class OwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Chain(WIDTH, 32, 32, 4)

    def forward(self, x, y):
        return F.cross_entropy(self.body(x), y)


def own_loss():
    batch = _job(lambda: None).batch
    return Job(OwnLoss, batch=(batch, None), optimizer=_sgd)


class Scalars(nn.Module):
    """Scalar and oddly shaped parameters."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Chain(WIDTH, 7, 5), nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.tensor([0.1]))
        self.gate = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        return self.head(self.body(x) * self.scale + self.shift + self.gate)


def scalars():
    return _job(Scalars)


def bf16():
    return _job(lambda: Chain(WIDTH, 32, 32, 4).to(torch.bfloat16), _job(chain).batch[0].to(torch.bfloat16))


class Mixed(nn.Module):
    """Parameters of two dtypes in one model, and an integer one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(WIDTH, 32), nn.Linear(32, 32).double(), nn.Linear(32, 4)
        self.order = nn.Parameter(torch.arange(32).flip(0), requires_grad=False)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x)).double()))
        return self.head(x.float()[:, self.order])


def mixed():
    return _job(Mixed)


class Complex(nn.Module):
    """Complex tensors between layers, and a complex parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64))
        self.second = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64))

    def forward(self, x):
        spectrum = torch.fft.rfft(torch.tanh(self.first(x))) * self.filter
        spectrum = spectrum + spectrum.abs() * self.second
        return self.head(torch.fft.irfft(spectrum * self.second, n=WIDTH))


def complex_values():
    return _job(Complex)


class Listed(nn.Module):
    """Plain tensors in a Python list; a parameter that is no contiguous tensor; a ParameterList."""

    def __init__(self):
        super().__init__()
        self.tables = [torch.ones(WIDTH), torch.arange(WIDTH).float() / WIDTH]
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.randn(32, WIDTH).t() * 0.2), nn.Parameter(torch.randn(4, 32).t() * 0.2)]
        )

    def forward(self, x):
        x = x * self.tables[0] + self.tables[1]
        return torch.tanh(x @ self.weights[0]) @ self.weights[1]


def listed():
    return _job(Listed)


class InPlace(nn.Module):
    """Tensors written in place, views of them too."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x.mul_(0.5)
            x[:, :4] += 1.0
            x = F.relu(x, inplace=True)
            x = x + 0.1
            x.mul_(2.0)
        return self.head(x)


def in_place():
    return _job(InPlace)


class Views(nn.Module):
    """What lies between layers is transposed, sliced, several tensors."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 3 * WIDTH)
        self.second = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        a, b, c = self.first(x).chunk(3, -1)
        a, b = torch.sin(self.second[0](a)), self.second[1](torch.cos(b))
        mask = a > 0
        c = self.second[2](torch.where(mask, c, b).t().contiguous().t())
        return self.head(torch.where(mask, a, c) + b)


def views():
    return _job(Views)


class Depth(nn.Module):
    """Drop path and dropout by function; noise."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        for layer in self.layers:
            keep = (torch.rand(x.shape[0], 1) < 0.8).to(x.dtype) / 0.8
            x = x + keep * F.dropout(torch.tanh(layer(x)), 0.1, self.training) + 0.01 * torch.randn_like(x)
        return self.head(x)


def noisy():
    return _job(Depth)


class Stateless(nn.Module):
    """Long runs of operators without a parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = self.first(x)
        for _ in range(12):
            x = torch.sin(x) + x.cumsum(-1) / 32
        return self.last(x)


def stateless():
    return _job(Stateless)


class Branching(nn.Module):
    """Python control flow on data: cannot be captured."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Chain(WIDTH, 32, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = self.body(x)
        return self.head(x if x.sum() > 0 else -x)


def branching():
    return _job(Branching)


class Rigid(nn.Module):
    """Works at any batch size, but Python looks at it, so that a capture holds for one size."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Chain(WIDTH, 32, 32, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        rows = [self.body(x[i : i + 1]) for i in range(x.shape[0])]
        return self.head(torch.cat(rows))


def rigid():
    return _job(Rigid)


class Squeezing(nn.Module):
    """squeeze() and a flattened batch."""

    def __init__(self):
        super().__init__()
        self.body, self.score = Chain(WIDTH, 32, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        n = x.shape[0]
        x = self.body(x).view(n * 4, WIDTH // 4).view(n, -1)
        return self.score(x).squeeze(-1)


def squeezing():
    return _job(Squeezing, targets=torch.randn(8, generator=torch.Generator().manual_seed(5)), loss=F.mse_loss)


class Experts(nn.Module):
    """Soft mixture of experts with stacked weights and einsum."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, WIDTH, 8) * 0.2), nn.Parameter(torch.randn(4, 8, WIDTH) * 0.2)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        hidden = torch.einsum("bd,edh->beh", x, self.up).relu()
        x = x + torch.einsum("beh,ehd,be->bd", hidden, self.down, self.gate(x).softmax(-1))
        return self.head(x)


def experts():
    return _job(Experts)


def clipped():
    return _job(
        lambda: Chain(WIDTH, 32, 32, 4),
        clip_norm=0.1,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        optimizer=lambda n: torch.optim.AdamW(n, 1e-2),
    )


def embedding_bag():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.body = nn.EmbeddingBag(20, WIDTH, mode="sum"), Chain(WIDTH, 32, 4)

        def forward(self, tokens):
            return self.body(self.bag(tokens))

    return _job(Bag, _tokens())


def outputs_tuple():
    """A model that gives a tuple, a loss that reads all of it."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = Chain(WIDTH, 32, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 1)

        def forward(self, x):
            x = self.body(x)
            return self.a(x), {"value": self.b(x).squeeze(-1)}

    return _job(Two, loss=lambda out, y: F.cross_entropy(out[0], y) + (out[1]["value"] - 1).square().mean())


def eager_loss():
    """A loss that cannot be captured: Python looks at the values."""

    def loss(outputs, targets):
        value = F.cross_entropy(outputs, targets)
        return value * 2 if float(value.detach()) > 0.01 else value

    return _job(lambda: Chain(WIDTH, 32, 32, 4), loss=loss)


def instance_norms():
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.InstanceNorm2d(8, affine=True),
            nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.ConvTranspose2d(8, 4, 2, 2),
            nn.PReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 4),
        )

    return _job(build, _images())


def attention_mask():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.att = nn.Embedding(20, WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20)

        def forward(self, tokens):
            x = self.table(tokens)
            y, _ = self.att(x, x, x, key_padding_mask=tokens == 0, need_weights=False)
            return self.out(self.norm(x + y))

    return _job(Masked, _tokens(), _tokens().roll(1, 1), _token_loss)


class Raising(Chain):
    def forward(self, x):
        raise ValueError("no such thing")


def raising():
    return _job(lambda: Raising(WIDTH, 4))


class NumpyNoise(Chain):
    """Draws from numpy in its forward: a graph would hold one draw for ever."""

    def forward(self, x):
        keep = torch.from_numpy((np.random.rand(WIDTH) < 0.9).astype("float32"))  # noqa: NPY002
        return super().forward(x * keep)


def numpy_noise():
    return _job(lambda: NumpyNoise(WIDTH, 32, 4))
