"""Fine-tuning of a part: what is frozen has no gradient, no optimizer state and half of its backward."""

from __future__ import annotations

import datetime

import pytest

from plait.advice.advise import advise
from plait.advice.bound import count_work
from plait.advice.needs import Needs
from plait.advice.trainable import with_trainable
from plait.cost.architecture import Architecture, build_graph
from plait.cost.step import estimate
from plait.errors import RequestError
from plait.hardware.clusters import named_cluster
from plait.hardware.offers import Offer
from plait.schema import Plan

SHAPE = Architecture(
    name="small",
    layers=6,
    hidden=512,
    ffn_hidden=2048,
    heads=8,
    kv_heads=8,
    head_dim=64,
    vocab=4096,
    seq_len=256,
    gated=False,
)
GRAPH = build_graph(SHAPE)
TODAY = datetime.date(2026, 8, 30)


def trained(graph):
    return sum(p.numel for p in graph.parameters if p.trainable)


def backward(graph):
    return sum(s.backward_flops for s in graph.segments)


def test_all_changes_nothing():
    assert with_trainable(GRAPH, "all") == GRAPH


def test_adapters_are_counted_by_hand():
    """rank x (inputs + outputs) beside each of the four matrices of a layer and the output projection."""
    rank = 8
    layer = (512 + 3 * 512) + (512 + 512) + (512 + 2048) + (2048 + 512)
    found = with_trainable(GRAPH, f"lora:rank={rank}")

    assert trained(found) == rank * (6 * layer + 512 + 4096)
    assert found.numel == GRAPH.numel + trained(found)


def test_frozen_matmuls_make_one_gradient_instead_of_two():
    """Attention's backward stays; that of the matrices halves, but for the first, which nothing before it needs."""
    found = with_trainable(GRAPH, "lora:rank=1")
    matrices = 2 * 256 * (6 * (512 * 1536 + 512 * 512 + 2 * 512 * 2048) + 512 * 4096)
    first = 2 * 256 * 512 * 1536
    attention = sum(op.backward_flops for s in GRAPH.segments for op in s.operators if op.kind == "attention")
    adapters = sum(op.backward_flops for s in found.segments for op in s.operators if ".lora" in op.name)

    assert backward(found) - adapters == pytest.approx(matrices - first + attention)


def test_only_the_head_runs_backward_where_only_the_head_is_trained():
    """Two products at most, and no kept activations before it."""
    found = with_trainable(GRAPH, "head.logits*")

    assert trained(found) == 512 * 4096
    assert backward(found) == 2 * 256 * 512 * 4096
    assert sum(s.saved_bytes for s in found.segments[:-1]) == 0


def test_a_fraction_trains_what_is_nearest_to_the_loss():
    """As many of the last parameters as make up that part."""
    found = with_trainable(GRAPH, "25%")

    assert trained(found) >= 0.25 * GRAPH.numel
    assert found.parameters[-1].trainable
    assert not found.parameters[0].trainable
    assert backward(found) < backward(GRAPH)


def test_memory_holds_frozen_weights_once_and_nothing_else_of_them():
    """bf16: two bytes each where all train with 2 + 4 + 12; the adapters have those."""
    cluster, plan = named_cluster("8xH100-SXM"), Plan(dp=8, precision="bf16", microbatches=1)
    full = estimate(GRAPH, cluster, plan, batch=8).memory[0]
    adapted = with_trainable(GRAPH, "lora:rank=8")
    found = estimate(adapted, cluster, plan, batch=8).memory[0]
    per = full.optimizer / GRAPH.numel

    assert found.parameters == pytest.approx(
        2 * GRAPH.numel + full.parameters / GRAPH.numel * trained(adapted), rel=1e-3
    )
    assert found.optimizer == pytest.approx(per * trained(adapted), rel=1e-3)
    assert found.gradients < 0.05 * full.gradients


def test_sharded_frozen_weights_are_sharded_too():
    """ZeRO-3 over eight: an eighth of two bytes each."""
    cluster, plan = named_cluster("8xH100-SXM"), Plan(fsdp=8, zero=3, precision="bf16", microbatches=1)
    adapted = with_trainable(GRAPH, "lora:rank=1")
    found = estimate(adapted, cluster, plan, batch=8).memory[0]

    assert found.parameters == pytest.approx(2 * GRAPH.numel / 8, rel=0.05)


def test_adapters_train_quicker_and_in_less_memory_than_everything():
    """Answers of the whole way: fewer hours, fewer dollars, more room; twice the tokens twice the hours."""
    offer = Offer(
        cloud="aws", instance_type="p5", accelerator="NVIDIA H100 SXM5", count=8, vcpus=8.0, memory_bytes=1e12, region="us-east-1",
        usd_per_hour=24.0, spot_usd_per_hour=None, as_of="2026-08-20", source="a test",
    )  # fmt: skip
    large = build_graph(Architecture(name="large", layers=16, hidden=4096, ffn_hidden=11008, heads=32, kv_heads=32, head_dim=128,
                                     vocab=32000, seq_len=1024))  # fmt: skip

    def ask(**more):
        return advise(large, Needs(task="finetune", **more), offers=(offer,), today=TODAY).answers[0]

    full, part = ask(tokens=1e9), ask(tokens=1e9, trainable="lora:rank=16")

    assert part.hours < full.hours
    assert part.on_demand.usd < full.on_demand.usd
    assert part.headroom_gib > full.headroom_gib
    assert ask(tokens=2e9, trainable="lora:rank=16").hours == pytest.approx(2 * part.hours)
    assert count_work(with_trainable(large, "lora:rank=16")).trained < 0.02 * large.numel


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("lora:rank=0", "rank must be a whole number"),
        ("lora:rank=many", "rank must be a whole number"),
        ("lora:width=4", "rank must be a whole number"),
        ("0", "not a fraction above 0"),
        ("1.5", "not a fraction above 0"),
        ("-5%", "not a fraction above 0"),
        ("nan", "not a fraction above 0"),
        ("*adapter*", "matches no parameter"),
    ],
)
def test_what_is_no_choice_is_refused(choice, says):
    """With how to write one."""
    with pytest.raises(RequestError, match=says) as caught:
        with_trainable(GRAPH, choice)

    assert "lora:rank=16" in caught.value.hint


def test_training_from_the_start_trains_all():
    """--trainable is for fine-tuning."""
    with pytest.raises(RequestError, match="--trainable lora and --task train clash"):
        Needs(trainable="lora")
