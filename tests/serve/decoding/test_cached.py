"""Prefill and decode are derived by dataflow, give the model's own tokens, and what cannot run so is refused with the line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import decoders
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from plait.errors import ServeError
from plait.serve.decoding.decode import add_decoder, compared, with_cache
from plait.serve.decoding.generate import capacity_of, greedy
from plait.serve.prepare import prepare
from plait.serve.source import eval_mode, source_of
from plait.serve.subject import Subject

CAPACITY = 40


class Hand(nn.Module):
    """Attention by hand: a registered mask, two matrix products, a sliced table of positions; grouped key heads."""

    def __init__(self, mixing: str = "") -> None:
        super().__init__()
        self.mixing = mixing
        self.token = nn.Embedding(31, 16)
        self.position = nn.Parameter(torch.randn(1, CAPACITY, 16) * 0.1)
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 31)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("mask", torch.ones(CAPACITY, CAPACITY, dtype=torch.bool).tril())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, 31]."""
        length = tokens.shape[1]
        x = self.token(tokens) + self.position[:, :length]
        if self.mixing == "before":
            x = x.cumsum(1)
        q = self.q(self.norm(x)).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, 1) for t in self.kv(x).chunk(2, -1))
        scores = q @ k.transpose(-2, -1) / 2
        if self.mixing != "bidirectional":
            scores = scores.masked_fill(~self.mask[:length, :length], float("-inf"))
        weights = scores.softmax(-1)
        if self.mixing == "weights":
            weights = weights.cumsum(-1)
        x = x + (weights @ v).transpose(1, 2).flatten(2)
        return self.out(x.softmax(1) if self.mixing == "after" else x)


class Fused(nn.Module):
    """Attention by the fused operator, rotated; a feed-forward that flattens positions."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.token, self.qkv = nn.Embedding(31, 16), nn.Linear(16, 48)
        self.up, self.head = nn.Linear(16, 16), nn.Linear(16, 31)
        self.register_buffer("rate", torch.tensor([1.0, 0.1]), persistent=False)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[2])[:, None] * self.rate
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """[batch, length] -> logits [batch, length, 31]."""
        x = self.token(tokens)
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        seen = F.scaled_dot_product_attention(self._rotated(q), self._rotated(k), v, is_causal=self.is_causal)
        x = x + seen.transpose(1, 2).flatten(2)
        x = x + self.up(x.reshape(-1, 16)).relu().reshape(x.shape)
        return {"hidden": x, "logits": self.head(x)}


class Alone(nn.Module):
    """Every position by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(31, 16), nn.Linear(16, 31)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, 31]."""
        return self.head(self.token(tokens).relu())


class Scans(Alone):
    """A state that a loop in Python carries from position to position."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, 31]."""
        x, states = self.token(tokens), []
        state = torch.zeros_like(x[:, 0])
        for i in range(tokens.shape[1]):
            state = 0.9 * state + x[:, i]
            states.append(state)
        return self.head(torch.stack(states, 1))


class Recurrent(Alone):
    """An LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.state = nn.LSTM(16, 16, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, 31]."""
        return self.head(self.state(self.token(tokens))[0])


def _subject(model: nn.Module, folder: Path) -> Subject:
    source = source_of(model, inputs=torch.zeros(2, 8, dtype=torch.int64))
    prepared = prepare(source, folder, asked=(1, 3), data=[], tell=lambda _: None)
    with eval_mode(model):
        found, proof = add_decoder(
            prepared.subject, model, source.serving_job.batch[0], capacity=CAPACITY, most=3, random=False
        )

    assert proof.first_difference is None
    assert proof.max_rel < 1e-5
    return found


@pytest.mark.parametrize("kind", [Hand, Fused])
def test_greedy_tokens_are_those_of_the_model(kind: type[nn.Module], tmp_path: Path) -> None:
    """Token for token with prefixes recomputed, through the saved programs; prompts of one token and of several."""
    torch.manual_seed(0)
    model = kind()
    subject = _subject(model, tmp_path)
    runs = {name: _positional(subject.program(name).module(check_guards=False)) for name in ("prefill", "decode")}

    assert capacity_of(subject.entries["decode"]) == CAPACITY
    for length in (1, 5):
        prompt = torch.randint(31, (3, length))
        expected = prompt
        for _ in range(CAPACITY + 1 - length):
            with torch.no_grad():
                outputs = model.eval()(expected)
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
            if expected.shape[1] == CAPACITY:  # the model itself has no more positions
                break
        got = greedy(runs, subject.entries, prompt, CAPACITY - length)

        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("kind", "caches"),
    [
        (decoders.Sink, 2),
        (decoders.Alibi, 2),
        (decoders.Einsum, 2),
        (decoders.Turned, 2),
        (decoders.Complex, 2),
        (decoders.Latent, 2),
        (decoders.Window, 4),  # keys, values and values of the second, and the tokens, for padding
        (decoders.Experts, 2),
        (decoders.Written, 3),  # and the tokens
        (decoders.Regions, 3),
        (decoders.Convolved, 4),  # and the inputs of the shift and of the convolution
        (decoders.LengthFirst, 2),
        (decoders.Dots, 2),
        (decoders.Blocks, 3),
        (decoders.Angles, 2),
        (decoders.Sparse, 3),  # keys, values, and what ranks them: the sum of the keys of all heads
        (partial(decoders.Last, "row"), 2),
        (partial(decoders.Last, "slice"), 2),
        (partial(decoders.Last, "list"), 2),
        (partial(decoders.Torch, "attention"), 4),
        (partial(decoders.Torch, "encoder"), 4),
        (partial(decoders.Torch, "length first"), 4),
        (partial(Hand, "before"), 3),  # and the input of the running sum
    ],
    ids=str.split(
        "sink alibi einsum turned complex latent window experts written regions conv fairseq dots blocks angles sparse "
        "last-row last-slice last-list mha encoder seq sum"
    ),
)
def test_ways_to_attend(kind: Callable[[], nn.Module], caches: int) -> None:
    """Position by position every one gives the logits and the tokens that it gives at once; and caches no more than that."""
    torch.manual_seed(0)
    model = kind()
    with eval_mode(model):
        derived, proof = with_cache(model, torch.zeros(2, 8, dtype=torch.int64), capacity=CAPACITY, most=3)

    assert proof.max_rel < 1e-5
    assert proof.first_difference is None
    assert len(derived.caches) == caches
    mixing = {
        "Blocks": {"slice"},
        "Convolved": {"pad", "slice", "conv1d"},
        "Written": {"cumsum"},
        "Regions": {"cumsum"},
        "Hand": {"cumsum"},
    }
    assert {line.split(":")[0] for line in proof.recomputed} == mixing.get(type(model).__name__, set())


def test_prefill_gives_no_logits_but_the_last() -> None:
    """The head runs at one position: no tensor is [batch, length, vocabulary]."""
    shapes = []

    class Shapes(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            shapes.append(tuple(getattr(value, "shape", ())))
            return value

    model = decoders.Sink()
    with eval_mode(model):
        derived, _ = with_cache(model, torch.zeros(2, 8, dtype=torch.int64), capacity=CAPACITY, most=3)
        Shapes(derived.prefill).run(torch.zeros(2, 7, dtype=torch.int64))

    assert (2, 1, decoders.TOKENS) in shapes
    assert (2, 7, decoders.TOKENS) not in shapes


def test_tables_that_are_not_saved_stay_so() -> None:
    """Moved weights must not move a rotary table in the artefact alone."""
    model = Fused()
    with eval_mode(model):
        derived, _ = with_cache(model, torch.zeros(2, 8, dtype=torch.int64), capacity=CAPACITY, most=3)

    for module in (derived.prefill, derived.decode):
        assert set(module.state_dict()) <= {f"model.{name}" for name in model.state_dict()}


def _positional(module: nn.Module) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    return lambda inputs: module(*inputs)


def test_the_cache_holds_key_heads_before_they_are_repeated(tmp_path: Path) -> None:
    """Two of them, not the four that attention reads."""
    subject = _subject(Hand(), tmp_path)
    shapes = [spec.shape for spec in subject.entries["decode"].inputs if spec.name.startswith("cache_")]

    assert sorted(n for shape in shapes for n in shape if n in (2, 4)) == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Hand("after"), "change with the positions after it, first those of aten.softmax.int"),
        (Hand("weights"), "first those of aten.matmul.default"),
        (Hand("bidirectional"), "first those of aten.matmul.default"),
        (Fused(is_causal=False), "attends to later positions"),
        (Alone(), "no position's result depends on another's"),
        (Scans(), "for i in range(tokens.shape[1]):"),
        (decoders.Regions(autocast=True), "autocast is switched on around it"),
        (Recurrent(), "self.head(self.state(self.token(tokens))[0])"),
    ],
    ids=str.split("softmax weights bidirectional fused alone scan autocast lstm"),
)
def test_what_mixes_positions_is_refused(model: nn.Module, words: str, tmp_path: Path) -> None:
    """By its operator and the user's line."""
    with pytest.raises(ServeError) as caught:
        _subject(model, tmp_path)

    assert words in str(caught.value)
    assert "tests/serve/" in str(caught.value)


def test_prefill_and_decode_are_spelled_for_runtimes(tmp_path: Path) -> None:
    """As the forward is: no operator is left that only torch knows."""

    class Counted(Fused):
        def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs = super().forward(tokens)
            ones = outputs["logits"].new_ones(outputs["logits"].shape[-1:])
            return {"logits": outputs["logits"] * ones}

    subject = _subject(Counted(), tmp_path)
    for name in ("prefill", "decode"):
        assert not {str(n.target) for n in subject.program(name).graph.nodes} & {
            "aten.new_ones.default",
            "aten.view.default",
        }


def test_a_prompt_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """With the room there is, and what to export instead."""
    entries = _subject(Fused(), tmp_path).entries

    with pytest.raises(ServeError, match="the cache has 40"):
        greedy({}, entries, torch.zeros(1, 30, dtype=torch.int64), 12)


def test_more_positions_than_the_model_has_are_refused(tmp_path: Path) -> None:
    """A table of positions that ends before the asked capacity."""
    model = Hand()
    source = source_of(model, inputs=torch.zeros(2, 8, dtype=torch.int64))
    prepared = prepare(source, tmp_path, asked=(1,), data=[], tell=lambda _: None)

    with eval_mode(model), pytest.raises(ServeError, match="at 64 positions"):
        add_decoder(prepared.subject, model, source.serving_job.batch[0], capacity=64, most=2, random=False)


def test_proof_names_where_tokens_part_and_by_what_margin() -> None:
    """A tie in the logits is told as one."""
    own = torch.zeros(1, 3, 4)
    own[0, :, 1] = 1.0
    given = own.clone()
    given[0, 2, 3] = 1.0 + 1e-6
    own[0, 2, 3] = 1.0 - 1e-6
    proof = compared(given, own, 7)

    assert proof.first_difference == 9
    assert proof.margin == pytest.approx(1e-6, rel=0.1)
