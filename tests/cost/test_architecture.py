from __future__ import annotations

import pytest

from plait.cost.architecture import Architecture, LatentAttention, build_graph, count_parameters
from plait.errors import TableError
from plait.schema import Graph

LLAMA = Architecture(
    name="llama-3-8b", layers=32, hidden=4096, ffn_hidden=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256,
    seq_len=8192,
)  # fmt: skip
SMALL = Architecture(
    name="small", layers=3, hidden=64, ffn_hidden=256, heads=4, kv_heads=4, head_dim=16, vocab=128, seq_len=32,
    gated=False, learned_positions=True, tied=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "billions"),
    [
        ({}, 8.030),  # huggingface.co/meta-llama/Meta-Llama-3-8B
        ({"layers": 80, "hidden": 8192, "ffn_hidden": 28672, "heads": 64}, 70.55),  # Meta-Llama-3-70B
        (
            {"layers": 61, "hidden": 7168, "ffn_hidden": 18432, "heads": 128, "kv_heads": 128, "vocab": 129280, "experts": 256,
             "topk": 8, "expert_ffn": 2048, "shared_ffn": 2048, "dense_layers": 3, "latent": LatentAttention()},
            671.0,
        ),  # DeepSeek-V3
    ],
)  # fmt: skip
def test_parameters_match_published_models(changes, billions):
    """Counted weight by weight, known models have their known size."""
    values = {name: getattr(LLAMA, name) for name in Architecture.__dataclass_fields__} | changes

    assert count_parameters(Architecture(**values)) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_flops_match_the_textbook():
    """Forward FLOP are 2 for each weight of a matmul and token, and 4 s h for attention (Narayanan et al. 2021)."""
    graph = build_graph(SMALL, batch=2)
    tokens, h, s, layers = 2 * 32, 64, 32, 3
    weights = layers * (4 * h * h + 8 * h * h) + 128 * h

    assert graph.flops == pytest.approx(tokens * (2 * weights + layers * 4 * s * h))


def test_layers_are_one_class():
    """Identical layers are described once, so that a cost is counted once."""
    graph = build_graph(SMALL)

    assert [segment.equals for segment in graph.segments] == [0, 1, 1, 1, 4]


def test_tied_output_is_counted_once():
    """The embedding that is the output projection as well is one parameter."""
    untied = Architecture(**{**{n: getattr(SMALL, n) for n in Architecture.__dataclass_fields__}, "tied": False})

    assert count_parameters(untied) - count_parameters(SMALL) == 128 * 64


def test_a_graph_comes_back_equal():
    """It is an ordinary graph."""
    graph = build_graph(SMALL)

    assert Graph.from_json(graph.to_json()) == graph


def test_nonsense_is_refused():
    """A model without layers is none."""
    with pytest.raises(TableError, match="layers=0"):
        Architecture(name="x", layers=0, hidden=1, ffn_hidden=1, heads=1, kv_heads=1, head_dim=1, vocab=1, seq_len=1)
