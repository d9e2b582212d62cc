"""A loaded artefact generates: with its cache, without one by the whole prefix again; what it cannot do is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from plait.errors import ServeError
from plait.serve.decoding.decode import add_decoder
from plait.serve.decoding.generate import roles_of
from plait.serve.decoding.generation import generation
from plait.serve.manifest import Manifest
from plait.serve.prepare import prepare
from plait.serve.runtimes.torch_program import TorchProgram
from plait.serve.served import Served, load
from plait.serve.source import eval_mode, source_of

CAPACITY = 24


class Decoder(nn.Module):
    """One block of causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.qkv, self.head = nn.Embedding(19, 8), nn.Linear(8, 24), nn.Linear(8, 19)
        self.position = nn.Embedding(CAPACITY, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, 19]."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Masked(Decoder):
    """With a mask of padding beside the tokens, and positions."""

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """[batch, length] each -> [batch, length, 19]."""
        x = self.token(tokens) + self.position(positions)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril() & mask[:, None, None].bool()
        return self.head(x + F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


def _served(model: nn.Module, folder: Path, *, cached: bool) -> Served:
    """As `plait export --to torch` writes it."""
    tokens = torch.randint(19, (2, CAPACITY))
    inputs = (
        (tokens, torch.ones_like(tokens), torch.arange(CAPACITY).expand(2, -1)) if isinstance(model, Masked) else tokens
    )
    source = source_of(model, inputs=inputs)
    subject_folder, out = folder / "subject", folder / "torch"
    for place in (subject_folder, out):
        place.mkdir(parents=True)
    subject = prepare(source, subject_folder, asked=(2,), data=[], tell=lambda _: None).subject
    if cached:
        with eval_mode(model):
            subject, _ = add_decoder(
                subject, model, source.serving_job.batch[0], capacity=CAPACITY, most=2, random=False
            )
    backend = TorchProgram()
    facts = dict(backend.export(subject, out, "fp32"))
    if cached:
        found = generation(backend, subject, out, facts, "fp32", 1, timed=True)

        assert found["equal"]
        assert found["first_difference"] is None
        assert found["backend"]["decode_tokens_per_s"] > 0
    Manifest(
        backend="torch",
        precision="fp32",
        entries=subject.entries,
        source="",
        weights_sha256="",
        plait="",
        versions={},
        facts=facts,
    ).write(out)
    return load(out, threads=1)


def _greedy(model: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens


def test_a_mask_and_positions_are_filled_in(tmp_path: Path) -> None:
    """A prompt has no padding: what the model takes beside tokens follows from them."""
    torch.manual_seed(1)
    model = Masked().eval()
    served = _served(model, tmp_path, cached=True)
    prompt = torch.randint(19, (2, 5))

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, torch.ones_like(tokens), torch.arange(tokens.shape[1]).expand_as(tokens))

    assert torch.equal(served.generate(prompt, max_new_tokens=12), _greedy(logits, prompt, 12))


def test_inputs_are_told_by_their_values() -> None:
    """Two inputs that both may be tokens, and features, are refused."""
    tokens, positions = torch.tensor([[5, 3, 3]]), torch.arange(3)[None]

    assert roles_of([positions]) == ["tokens"]
    assert roles_of([torch.ones(1, 3), tokens, positions]) == ["ones", "tokens", "positions"]
    for wrong in ([tokens, tokens], [tokens.float()], [tokens, torch.ones(1, 4)], [tokens[0]], []):
        assert roles_of(wrong) is None


@pytest.mark.parametrize("cached", [True, False])
def test_tokens_are_those_of_the_model(cached: bool, tmp_path: Path) -> None:
    """With and without a cache; and a row that has met its last token stays there."""
    torch.manual_seed(1)
    model = Decoder().eval()
    served = _served(model, tmp_path, cached=cached)
    prompt = torch.randint(19, (2, 5))
    expected = _greedy(model, prompt, 12)
    stop = int(expected[0, 8])
    end = 5 + int((expected[0, 5:] == stop).nonzero()[0]) + 1
    stopped = served.generate(prompt, max_new_tokens=12, stop=stop)

    assert ("decode" in served.manifest.entries) is cached
    assert torch.equal(served.generate(prompt, max_new_tokens=12), expected)
    assert torch.equal(stopped[0, :end], expected[0, :end])
    assert (stopped[0, end:] == stop).all()
    for wrong, words in (
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "a prompt is whole numbers"),
        ({"tokens": prompt.float()}, "a prompt is whole numbers"),
        ({"tokens": prompt, "max_new_tokens": 0}, "at least 1"),
        ({"tokens": prompt, "max_new_tokens": 40}, "positions"),
    ):
        with pytest.raises(ServeError, match=words):
            served.generate(**wrong)  # type: ignore[arg-type]
