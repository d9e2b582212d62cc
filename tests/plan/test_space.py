from __future__ import annotations

import pytest

from plait.cost.architecture import Architecture, build_graph
from plait.hardware.clusters import named_cluster
from plait.plan.space import Degrees, Space, degrees, facts_of, illegal, microbatch_counts, unsupported
from plait.schema import Plan

MOE = build_graph(
    Architecture(name="moe", layers=4, hidden=512, ffn_hidden=2048, heads=8, kv_heads=2, head_dim=64, vocab=1024, seq_len=2048,
                 experts=8, topk=2, expert_ffn=1024)
)  # fmt: skip
FACTS = facts_of(MOE)
CLUSTER = named_cluster("16xA100")


def test_facts_are_read_from_the_graph():
    """Heads, experts and length limit what is legal."""
    assert (FACTS.heads, FACTS.experts, FACTS.tokens, FACTS.segments) == (frozenset({8, 2}), 8, 2048, 6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tp": 4}, "2 attention heads do not divide by 4"),
        ({"tp": 16, "replicas": 1}, "attention heads"),
        ({"cp": 8}, "256 tokens a device"),
        ({"pp": 7}, "the model has 6 segments"),
        ({"ep": 3, "replicas": 3}, "8 experts do not divide by 3"),
        ({"ep": 8, "replicas": 4}, "ep=8 does not divide dp x fsdp = 4"),
        ({}, ""),
    ],
)
def test_illegal_degrees_have_a_reason(changes, reason):
    """Each rule says what it is about."""
    values = {"tp": 1, "cp": 1, "pp": 1, "ep": 1, "replicas": 16, **changes}

    found = illegal(FACTS, CLUSTER, Degrees(**values))
    assert reason in found
    assert bool(reason) == bool(found)


def test_all_devices_are_used_on_small_clusters():
    """A plan for a few devices leaves none idle."""
    legal = [d for d, reason in degrees(FACTS, CLUSTER, 32, Space()) if not reason]

    assert legal
    assert all(d.devices == 16 for d in legal)


def test_microbatches_divide():
    """Every count divides the samples of a replica; the size of a microbatch is a power of two or the whole."""
    assert microbatch_counts(24, 2, CLUSTER, Space()) == [12, 6, 3, 1]
    assert microbatch_counts(24, 2, CLUSTER, Space(microbatch_sizes=(3,))) == [4]


def test_mixed_clusters_may_split_a_batch_unevenly():
    """Where replicas may take unequal shares, a batch need not divide by them."""
    mixed = named_cluster("4xA100+2xV100")
    counts = [
        d.replicas for d, reason in degrees(FACTS, mixed, 16, Space(tp=(1,), pp=(1,), cp=(1,), ep=(1,))) if not reason
    ]

    assert counts == [6]
    assert microbatch_counts(16, 6, mixed, Space()) == [2, 1]


@pytest.mark.parametrize(("spec", "word"), [("cp=2", "context"), ("ep=2,dp=2", "expert"), ("precision=fp8", "fp8")])
def test_what_cannot_run_says_why(spec, word):
    """Planned, not run."""
    assert any(word in reason for reason in unsupported(Plan.parse(spec)))
    assert unsupported(Plan.parse("dp=2,fsdp=2,tp=2,pp=2")) == ()
