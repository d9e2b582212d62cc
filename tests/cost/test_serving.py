"""The serving cost model, by hand arithmetic and by laws."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plait.cost.architecture import Architecture, LatentAttention, build_graph
from plait.cost.serving import Load, ServingPlan, batches, estimate_serving, parameters_for
from plait.cost.serving_work import Experts, served_work
from plait.errors import PlanError
from plait.schema import Cluster, Device, Group, Link

SHAPE = Architecture(
    name="small", layers=4, hidden=1024, ffn_hidden=4096, heads=16, kv_heads=4, head_dim=64, vocab=32000, seq_len=512
)
WORK = served_work(build_graph(SHAPE))
DEVICE = Device(
    name="part", peak_flops={"bf16": 1e14, "fp8": 2e14}, memory_bytes=16 * 2**30, memory_bandwidth=1e12, source="a test"
)
LOAD = Load(input_tokens=512, output_tokens=128)


def cluster(count=1, bandwidth=1e11, latency=5e-6, device=DEVICE):
    links = (Link(level="node", size=count, bandwidth=bandwidth, latency=latency),) if count > 1 else ()
    return Cluster(name="test", groups=(Group(device=device, count=count),), links=links)


def test_work_is_the_weights_and_heads_of_the_architecture():
    """Matrices, FLOP and cache, counted by hand; grouped queries keep a quarter of the keys."""
    layer = 1024 * (1024 + 2 * 4 * 64) + 1024 * 1024 + 3 * 1024 * 4096

    assert WORK.decodes
    assert WORK.matmul_weights == 4 * layer
    assert WORK.flops == 2 * 4 * layer
    assert WORK.head_weights == 1024 * 32000
    assert WORK.cached == 4 * 2 * 4 * 64
    assert WORK.cache_heads == 4
    assert WORK.attention_flops == pytest.approx(4 * 2 * 2 * 16 * 64)
    assert WORK.parameters == pytest.approx(build_graph(SHAPE).numel)
    assert WORK.collective == 1024


def test_latent_attention_caches_the_latent():
    """512 + 64 elements a layer, held whole by every device: DeepSeek-V3's, whatever the heads."""
    graph = build_graph(replace(SHAPE, heads=32, kv_heads=32, head_dim=128, latent=LatentAttention()))

    assert served_work(graph).cached == 4 * (512 + 64)
    assert served_work(graph).cache_heads == 1


def test_experts_are_read_as_tokens_meet_them():
    """One token meets two of eight; many meet all."""
    found = served_work(build_graph(replace(SHAPE, experts=8, topk=2, expert_ffn=2048))).experts

    assert found.count == 8
    assert found.active == 2
    assert found.weights == 4 * 8 * 3 * 1024 * 2048
    assert found.flops == 4 * 2 * 2 * 3 * 1024 * 2048
    assert found.touched(1) == pytest.approx(0.25)
    assert Experts(weights=1, count=8, active=2, flops=1).touched(100) == pytest.approx(1.0)


def test_a_small_step_costs_reading_the_weights():
    """Batch 1: bytes of weights over bandwidth reached, nothing of it hidden."""
    found = estimate_serving(WORK, cluster(), ServingPlan(), LOAD)
    bandwidth = 1e12 * parameters_for(DEVICE)["memory"]

    assert found.parts["weights"] == pytest.approx(2 * (WORK.matmul_weights + WORK.head_weights) / bandwidth)
    assert found.decode == pytest.approx(sum(found.parts.values()))


def test_memory_is_weights_cache_and_activations():
    """By hand: 16 sequences of 640 positions in 16 bits; halved where two devices hold them."""
    alone = estimate_serving(WORK, cluster(), ServingPlan(batch=16), LOAD).memory
    two = estimate_serving(WORK, cluster(2), ServingPlan(tp=2, batch=16), LOAD).memory

    assert alone.cache == 16 * 640 * WORK.cached * 2
    assert alone.weights == 2 * WORK.parameters
    assert alone.total == alone.weights + alone.cache + alone.activations
    assert two.cache == alone.cache / 2
    assert two.weights == alone.weights / 2


def test_cache_is_split_by_no_more_than_its_heads():
    """Eight devices and four key heads: each device holds a quarter."""
    eight = estimate_serving(WORK, cluster(8), ServingPlan(tp=8, batch=16), LOAD).memory

    assert eight.cache == 16 * 640 * WORK.cached * 2 / 4


def test_the_largest_batch_just_fits():
    """It fits, and one more does not."""
    most = estimate_serving(WORK, cluster(), ServingPlan(), LOAD).largest_batch

    assert estimate_serving(WORK, cluster(), ServingPlan(batch=most), LOAD).fits
    assert not estimate_serving(WORK, cluster(), ServingPlan(batch=most + 1), LOAD).fits
    assert batches(100) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert batches(0) == []


@pytest.mark.parametrize("batch", [1, 2, 8, 32, 128])
def test_more_at_once_is_more_tokens_and_more_waiting(batch):
    """Throughput and latency both rise with the batch; the first token does not depend on it."""
    one = estimate_serving(WORK, cluster(), ServingPlan(batch=batch), LOAD)
    two = estimate_serving(WORK, cluster(), ServingPlan(batch=2 * batch), LOAD)

    assert two.throughput > one.throughput
    assert two.latency > one.latency
    assert two.first_token == one.first_token
    assert one.throughput == pytest.approx(batch / one.latency)


def test_laws_of_rates():
    """More bandwidth, more arithmetic, fewer bits, a quicker link: never slower."""
    base = estimate_serving(WORK, cluster(2), ServingPlan(tp=2, batch=32), LOAD)
    wide = replace(DEVICE, memory_bandwidth=2e12)
    quick = replace(DEVICE, peak_flops={"bf16": 2e14, "fp8": 4e14})

    assert estimate_serving(WORK, cluster(2, device=wide), ServingPlan(tp=2, batch=32), LOAD).latency < base.latency
    assert estimate_serving(WORK, cluster(2, device=quick), ServingPlan(tp=2, batch=32), LOAD).latency < base.latency
    assert estimate_serving(WORK, cluster(2), ServingPlan(tp=2, batch=32, precision="fp8"), LOAD).latency < base.latency
    assert estimate_serving(WORK, cluster(2, latency=5e-5), ServingPlan(tp=2, batch=32), LOAD).latency >= base.latency
    assert estimate_serving(WORK, cluster(2, bandwidth=1e9), ServingPlan(tp=2, batch=32), LOAD).latency > base.latency


def test_replicas_multiply_throughput_alone():
    """Three replicas: three times the tokens at the same latency."""
    one = estimate_serving(WORK, cluster(), ServingPlan(batch=8), LOAD)
    three = estimate_serving(WORK, cluster(3), ServingPlan(batch=8, replicas=3), LOAD)

    assert three.throughput == pytest.approx(3 * one.throughput)
    assert three.latency == one.latency


def test_a_pipeline_hands_each_token_through_all_stages():
    """Two stages at half the batch each take at least as long a token as one device that reads all weights once."""
    one = estimate_serving(WORK, cluster(), ServingPlan(batch=2), LOAD)
    two = estimate_serving(WORK, cluster(2), ServingPlan(pp=2, batch=2), LOAD)

    assert two.memory.weights == one.memory.weights / 2
    assert two.parts["communication"] > 0
    assert two.decode > one.decode * 0.9


def test_an_encoder_runs_forward_only():
    """No cache, latency of one batch, samples a second."""
    work = replace(WORK, decodes=False, cached=0.0)
    found = estimate_serving(work, cluster(), ServingPlan(batch=8), Load())

    assert found.memory.cache == 0
    assert found.throughput == pytest.approx(8 / found.latency)
    assert found.first_token == found.latency


def test_what_cannot_be_is_refused():
    """More devices than there are, no such precision, no devices at all."""
    with pytest.raises(PlanError, match="needs 4 devices a replica"):
        estimate_serving(WORK, cluster(2), ServingPlan(tp=4), LOAD)
    with pytest.raises(PlanError, match="precision=int3"):
        ServingPlan(precision="int3")
    with pytest.raises(PlanError, match="tp=0"):
        ServingPlan(tp=0)
