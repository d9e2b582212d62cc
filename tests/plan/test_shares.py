from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from plait.cost.architecture import Architecture, build_graph
from plait.cost.step import estimate
from plait.hardware.clusters import named_cluster
from plait.plan.explain import explain
from plait.plan.search import search
from plait.plan.shares import all_divisions, by_speed, neighbours
from plait.plan.space import Space
from plait.schema import Plan

GRAPH = build_graph(
    Architecture(name="gpt", layers=6, hidden=1024, ffn_hidden=4096, heads=16, kv_heads=16, head_dim=64, vocab=16384,
                 seq_len=512)
)  # fmt: skip
MIXED = named_cluster("4xH100+4xV100")
REPLICAS = Space(tp=(1,), pp=(1,), cp=(1,))

KIND = st.tuples(st.integers(1, 4), st.floats(0.1, 10.0), st.floats(0.0, 5.0))
"""(replicas, seconds a sample, seconds whatever the samples)"""


@given(st.lists(KIND, min_size=1, max_size=3), st.integers(0, 12))
def test_no_division_is_faster(kinds, spare):
    """Of all ways to divide the samples none makes the slowest replica faster."""
    counts = [count for count, _, _ in kinds]
    total = sum(counts) + spare

    def slowest(held):
        return max(f + s * -(-h // c) for h, (c, s, f) in zip(held, kinds, strict=True))

    held = by_speed(total, counts, lambda kind, samples: kinds[kind][2] + kinds[kind][1] * samples)

    assert sum(held) == total
    assert all(h >= c for h, c in zip(held, counts, strict=True))
    assert slowest(held) == min(slowest(option) for option in all_divisions(total, counts, 10**6))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 9), st.floats(0.01, 100.0))
def test_equal_speeds_give_equal_shares(counts, samples, seconds):
    """Kinds that are equally fast get the same for each replica."""
    held = by_speed(sum(counts) * samples, counts, lambda _, n: seconds * n)

    assert held == [count * samples for count in counts]


def test_divisions_and_neighbours_keep_the_sum():
    """Every division uses all samples and leaves each replica one."""
    every = list(all_divisions(9, [2, 1, 3], 100))

    assert len(every) == len({tuple(h) for h in every}) == 10
    assert all(sum(h) == 9 and h[0] >= 2 and h[1] >= 1 and h[2] >= 3 for h in every)
    assert all_divisions(9, [2, 1, 3], 9) is None
    assert list(neighbours([4, 4], [2, 4])) == [[2, 6]]


def test_shares_by_speed_are_faster_than_equal_ones():
    """Four quick and four slow devices as replicas: the quick ones take more, and all are done at about the same time."""
    found = search(GRAPH, MIXED, batch=64, precision="fp16", space=REPLICAS)
    best = found.best
    even = estimate(GRAPH, MIXED, Plan(dp=8, microbatches=1, precision="fp16"), 64)
    quick, slow = found.estimate.lanes

    assert sum(best.batch_shares) == 64
    assert best.batch_shares[0] > 2 * best.batch_shares[7]
    assert found.estimate.step_time_s < 0.7 * even.step_time_s
    assert slow.step_time_s > 0.7 * quick.step_time_s
    assert Plan.load(best.spec()).batch_shares == best.batch_shares


def test_a_batch_that_does_not_divide_is_shared_unevenly():
    """Seven samples on six devices of two kinds."""
    found = search(GRAPH, named_cluster("4xH100+2xV100"), batch=7, precision="fp16", space=REPLICAS)

    assert sum(found.best.batch_shares) == 7
    assert len(found.best.batch_shares) == 6


def test_the_explanation_says_who_gets_how_much():
    """Samples and seconds of each kind of replica."""
    found = search(GRAPH, MIXED, batch=64, precision="fp16", space=REPLICAS)
    lines = "\n".join(explain(found, GRAPH, MIXED, other_counts=()).lines)

    assert "samples by speed" in lines
    assert "V100" in lines


def test_memory_of_every_rank_is_told():
    """Replicas with more samples hold more activations."""
    summary = estimate(GRAPH, MIXED, Plan.parse("dp=8,batch_shares=4x12:4x4,precision=fp16"), 64).summary()
    by_rank = summary["peak_memory_gib_by_rank"]

    assert len(by_rank) == 8
    assert by_rank[0] > by_rank[7]
    assert [lane["samples"] for lane in summary["lanes"]] == [12, 4]


def test_all_shares_of_a_microbatch_can_be_tried():
    """A small case whose every division is enumerated."""
    space = Space(tp=(1,), pp=(1,), cp=(1,), all_shares=100, mixed=False, recompute=("none",), zero=(1,))
    cluster = named_cluster("1xH100+1xV100")
    found = search(GRAPH, cluster, batch=8, precision="fp16", space=space)
    every = [
        estimate(GRAPH, cluster, Plan(dp=dp, fsdp=2 // dp, zero=1, microbatches=m, precision="fp16",
                                      batch_shares=(m * first, m * (8 // m - first))), 8).step_time_s
        for dp, m in itertools.product((1, 2), (1, 2, 4))
        for first in range(1, 8 // m)
    ]  # fmt: skip

    assert found.estimate.step_time_s == min(every)
