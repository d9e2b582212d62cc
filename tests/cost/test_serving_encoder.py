"""Encoder-decoders, on one that is written down by hand: eight wide, six positions in, four out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plait.cost.serving import Load, ServingPlan, estimate_serving
from plait.cost.serving_work import served_work
from plait.schema import Cluster, Device, Graph, Group, Operator, ParameterSpec, Segment, TensorSpec

WIDE, VOCABULARY, SOURCE, TARGET = 8, 50, 6, 4
DEVICE = Device(
    name="part", peak_flops={"bf16": 1e12}, memory_bytes=2**30, memory_bandwidth=1e11, family="none", source="a test"
)


def tensor(name, *shape, dtype="float32"):
    return TensorSpec(name=name, shape=shape, dtype=dtype)


def matrix(name, rows=WIDE):
    return ParameterSpec(name=name, shape=(rows, WIDE), dtype="float32")


def build(target="target"):
    """Tokens in, one attention; tokens out, one attention to themselves and one to the encoder; a tied table."""
    operators, weights = [], [matrix("table", VOCABULARY)]

    def look(out, ids, length):
        found = tensor(out, 1, length, WIDE)
        operators.append(Operator(name=out, target="aten.embedding.default", kind="embedding", module="",
                                  inputs=(tensor("table", VOCABULARY, WIDE), tensor(ids, 1, length, dtype="int64")),
                                  outputs=(found,), parameters=("table",)))  # fmt: skip
        return found

    def linear(out, source):
        weights.append(matrix(f"w_{out}"))
        found = tensor(out, *source.shape)
        operators.append(Operator(name=out, target="aten.linear.default", kind="matmul", module="", inputs=(source,),
                                  outputs=(found,), parameters=(f"w_{out}",), flops=2.0 * source.shape[1] * WIDE * WIDE))  # fmt: skip
        return found

    def attend(out, q, k, v):
        found = tensor(out, *q.shape)
        operators.append(Operator(name=out, target="aten.scaled_dot_product_attention.default", kind="attention", module="",
                                  inputs=(q, k, v), outputs=(found,), flops=4.0 * q.shape[1] * k.shape[1] * WIDE,
                                  gemm=(1, q.shape[1], k.shape[1], WIDE)))  # fmt: skip
        return found

    source = look("source_e", "source", SOURCE)
    inside = attend("inside", *(linear(f"inside_{x}", source) for x in "qkv"))
    tokens = look("target_e", target, TARGET)
    own = attend("own", *(linear(f"own_{x}", tokens) for x in "qkv"))
    across = attend("across", linear("across_q", own), linear("across_k", inside), linear("across_v", inside))
    operators.append(Operator(name="scores", target="aten.linear.default", kind="matmul", module="", inputs=(across,),
                              outputs=(tensor("scores", 1, TARGET, VOCABULARY),), parameters=("table",),
                              flops=2.0 * TARGET * WIDE * VOCABULARY))  # fmt: skip
    segment = Segment(index=0, name="", operators=tuple(operators), parameters=tuple(w.name for w in weights), live_in=(),
                      live_out=(), equals=0)  # fmt: skip
    inputs = [tensor("source", 1, SOURCE, dtype="int64")]
    if target == "target":
        inputs.append(tensor("target", 1, TARGET, dtype="int64"))
    return Graph(name="translator", batch=1, tokens_per_sample=TARGET, inputs=tuple(inputs), parameters=tuple(weights),
                 buffers=(), segments=(segment,))  # fmt: skip


def test_the_encoder_is_what_the_decoder_s_tokens_do_not_reach():
    """Its own projections and those that make keys and values for the decoder; each counted by hand."""
    work = served_work(build())

    assert work.decodes
    assert work.encoder is not None
    assert work.encoder.length == SOURCE
    assert work.encoder.matmul_weights == 5 * WIDE * WIDE  # q, k, v inside; k and v across
    assert work.encoder.flops == 5 * 2 * WIDE * WIDE
    assert work.encoder.attention_flops == 4 * WIDE
    assert work.matmul_weights == 4 * WIDE * WIDE  # q, k, v of its own; q across
    assert work.cached == 2 * WIDE
    assert work.cross_cached == 2 * WIDE
    assert work.cross_flops == 4 * WIDE
    assert not work.is_fixed
    assert work.parameters == build().numel


def test_a_decoder_alone_has_no_encoder():
    """Where both sides look up the same input, nothing is across."""
    work = served_work(build(target="source"))

    assert work.encoder is None
    assert work.cross_cached == 0


def test_the_prompt_is_read_once_and_its_keys_are_kept():
    """Memory by hand; a longer prompt costs the encoder and the cache, not the decoder's weights."""
    work = served_work(build())
    here = Cluster(name="one", groups=(Group(device=DEVICE, count=1),), links=())
    load = Load(input_tokens=100, output_tokens=20)
    found = estimate_serving(work, here, ServingPlan(batch=3), load)
    longer = estimate_serving(work, here, ServingPlan(batch=3), replace(load, input_tokens=200))

    assert found.memory.cache == 3 * (20 * 2 * WIDE + 100 * 2 * WIDE) * 2
    assert found.memory.weights == pytest.approx(build().numel * 2)
    assert longer.parts["weights"] == found.parts["weights"]
    assert longer.parts["cache"] > found.parts["cache"]
    assert longer.latency > found.latency
    assert found.first_token == pytest.approx(sum(found.first_parts.values()))
