from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cost.architecture import Architecture, build_graph
from plait.cost.work import Split, segment_work

LAYER = Architecture(
    name="layer", layers=2, hidden=512, ffn_hidden=2048, heads=8, kv_heads=8, head_dim=64, vocab=1024, seq_len=256
)
GRAPH = build_graph(LAYER)


def work(**changes):
    return segment_work(GRAPH, GRAPH.segments[1], Split(**{"samples": 4, **changes}))


def test_a_layer_has_the_hand_written_layout():
    """Tensor parallelism needs two all-reduces forward and two backward for each layer (Megatron-LM)."""
    found = work(tp=4)
    size = 4 * 256 * 512 * 2

    assert found.tp_forward == (size, size)
    assert found.tp_backward == (size, size)
    assert found.tp_gathered == 0


def test_matmul_work_is_split_evenly():
    """Each of four devices does a quarter of the arithmetic and holds a quarter of the large weights."""
    one, four = work(), work(tp=4)

    assert four.forward.matmul_flops == pytest.approx(one.forward.matmul_flops / 4)
    assert four.forward.attention_flops == pytest.approx(one.forward.attention_flops / 4)
    assert four.dense_parameters == pytest.approx(one.dense_parameters / 4, rel=0.01)
    assert four.model_flops == one.model_flops


@settings(deadline=None)
@given(tp=st.sampled_from([1, 2, 4, 8]), samples=st.integers(1, 16), sequence=st.booleans())
def test_splitting_never_adds_memory(tp, samples, sequence):
    """A larger group keeps no more on each device, sequence parallelism still less, recomputation less again."""
    whole, split = work(samples=samples), work(samples=samples, tp=tp)
    shared = work(samples=samples, tp=tp, sequence_parallel=True)

    assert shared.saved <= split.saved <= whole.saved
    assert split.saved_full <= split.saved_selective <= split.saved
    if sequence and tp > 1:
        assert shared.saved == pytest.approx(whole.saved / tp, rel=0.02)


@settings(deadline=None)
@given(st.integers(1, 64))
def test_work_grows_with_samples(samples):
    """Twice the samples are twice the tokens' work and memory, and the same parameters."""
    one, two = work(samples=samples), work(samples=2 * samples)

    assert two.saved == 2 * one.saved
    assert two.dense_parameters == one.dense_parameters
    assert two.forward.operators == one.forward.operators


def test_activations_match_the_formula():
    """An unfused GPT layer keeps s b h (34 + 5 a s / h) bytes (Korthikanti et al. 2022, equation 1)."""
    gpt = Architecture(
        name="gpt", layers=1, hidden=512, ffn_hidden=2048, heads=8, kv_heads=8, head_dim=64, vocab=1024, seq_len=256,
        gated=False, learned_positions=True, fused_attention=False, dropout=True,
    )  # fmt: skip
    graph = build_graph(gpt)
    found = segment_work(graph, graph.segments[1], Split(samples=4))
    s, b, h, a = 256, 4, 512, 8

    assert found.saved == pytest.approx(s * b * h * (34 + 5 * a * s / h), rel=0.02)


def test_fp32_doubles_bytes():
    """At full precision everything is twice as wide."""
    assert work(precision="fp32").saved == pytest.approx(2 * work().saved, rel=0.01)
