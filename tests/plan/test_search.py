from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from plait.cost.architecture import Architecture, build_graph
from plait.cost.lanes import device_runs
from plait.cost.model import Cache
from plait.cost.step import estimate
from plait.errors import HardwareError, PlanError
from plait.hardware.clusters import named_cluster
from plait.plan.search import search
from plait.plan.space import Space, unsupported
from plait.schema import Cluster, Device, Group, Link, Plan

GPT = Architecture(
    name="gpt", layers=6, hidden=1024, ffn_hidden=4096, heads=16, kv_heads=16, head_dim=64, vocab=16384, seq_len=512
)
GRAPH = build_graph(GPT)

# The reduced space: every tp, pp, replicas that use all devices, dp or fsdp with each ZeRO degree, every microbatch size
# that divides, GPipe, 1F1B and zero-bubble, one recompute choice for all, and every way to cut.
REDUCED = Space(
    cp=(1,), schedules=("gpipe", "1f1b", "zerobubble"), mixed=False, sequence_parallel=("no",), shard_within=False,
    all_cuts=10**6, idle=0.0,
)  # fmt: skip


def exhaustive(graph, cluster, batch):
    """The shortest step over the reduced space, each plan estimated in full."""
    best, cache = None, Cache()
    count, segments = cluster.devices, len(graph.segments)
    heads = next(op.inputs[0].shape[1] for op in graph.segments[1].operators if op.kind == "attention")
    for tp, pp in itertools.product(range(1, count + 1), repeat=2):
        if count % (tp * pp) or heads % tp or pp > segments or tp > cluster.links[0].size:
            continue
        replicas = count // (tp * pp)
        if batch % replicas and cluster.is_uniform:
            continue
        shards = [(1, 1)] + ([(replicas, z) for z in (1, 2, 3)] if replicas > 1 else [])
        schedules = ("gpipe", "1f1b", "zerobubble") if pp > 1 else ("1f1b",)
        for (m, shares), (fsdp, zero), schedule, recompute in itertools.product(
            list(divisions(cluster, batch, tp, pp, replicas)), shards, schedules, ("none", "selective", "full")
        ):
            for cuts in itertools.combinations(range(1, segments), pp - 1):
                plan = Plan(dp=replicas // fsdp, fsdp=fsdp, zero=zero, tp=tp, pp=pp, microbatches=m, batch_shares=shares,
                            schedule=schedule, recompute=recompute, precision="bf16", cuts=cuts)  # fmt: skip
                found = estimate(graph, cluster, plan, batch, cache=cache)
                if found.fits and (best is None or found.step_time_s < best):
                    best = found.step_time_s
    return best


def divisions(cluster, batch, tp, pp, replicas):
    """(microbatches, shares): on one kind of device microbatches of a power of two samples or all; on several, every
    number that divides the batch, evenly or with any number of samples on each kind of replica.
    """
    if cluster.is_uniform:
        samples = batch // replicas
        for size in range(1, samples + 1):
            if samples % size == 0 and (size & (size - 1) == 0 or size == samples):
                yield samples // size, ()
        return
    runs = list(device_runs(cluster, Plan(dp=replicas, tp=tp, pp=pp, precision="bf16")))
    names = [tuple(d.name for d in devices) for first, last, devices in runs for _ in range(first, last)]
    kinds = sorted(set(names))
    for m in range(1, batch + 1):
        whole = batch // m
        if batch % m or whole < replicas:
            continue
        if whole % replicas == 0:
            yield m, ()
        for held in itertools.product(range(1, whole), repeat=len(kinds) - 1):
            totals = dict(zip(kinds, (*held, whole - sum(held)), strict=True))
            if any(totals[kind] < names.count(kind) for kind in kinds):
                continue
            seen = dict.fromkeys(kinds, 0)
            shares = []
            for name in names:
                base, extra = divmod(totals[name], names.count(name))
                shares.append(m * (base + (seen[name] < extra)))
                seen[name] += 1
            yield m, tuple(shares)


def random_case(seed):
    """A small random model on a small random cluster."""
    choose = random.Random(seed)
    heads = choose.choice([2, 4, 8])
    model = Architecture(
        name=f"model-{seed}", layers=choose.randint(1, 3), hidden=heads * 64, ffn_hidden=choose.choice([2, 4]) * heads * 64,
        heads=heads, kv_heads=heads, head_dim=64, vocab=choose.choice([256, 4096]), seq_len=choose.choice([64, 256]),
        gated=choose.random() < 0.5, tied=choose.random() < 0.5,
    )  # fmt: skip
    count = choose.choice([2, 3, 4, 6, 8, 16])
    node = choose.choice([n for n in (2, 4, 8, 16) if n <= max(2, count)])
    device = Device(
        name="part", peak_flops={"bf16": 10 ** choose.uniform(11, 14)}, memory_bandwidth=10 ** choose.uniform(10.5, 12),
        memory_bytes=choose.choice([1.5e9, 4e9, 16e9]),
    )  # fmt: skip
    links = [
        Link(level="node", size=node, bandwidth=10 ** choose.uniform(9.5, 11.5), latency=choose.choice([1e-6, 1e-5]))
    ]
    if count > node:
        links.append(Link(level="site", size=count, bandwidth=10 ** choose.uniform(9, 10.5), latency=1e-5))
    cluster = Cluster(name=f"cluster-{seed}", groups=(Group(device=device, count=count),), links=tuple(links))
    return build_graph(model), cluster, count * choose.choice([1, 2])


@pytest.mark.parametrize("seed", range(56))
def test_search_finds_what_exhaustive_enumeration_finds(seed):
    """On every small case the search's best step time is the smallest there is."""
    graph, cluster, batch = random_case(seed)
    best = exhaustive(graph, cluster, batch)
    if best is None:
        with pytest.raises(PlanError, match="no plan fits"):
            search(graph, cluster, batch=batch, precision="bf16", space=REDUCED, top=1)
        return

    found = search(graph, cluster, batch=batch, precision="bf16", space=REDUCED, top=1)

    assert found.estimate.step_time_s == pytest.approx(best, rel=1e-9)


def mixed_case(seed):
    """A small random model on a small cluster of two kinds of device."""
    choose = random.Random(1000 + seed)
    graph, cluster, _ = random_case(1000 + seed)
    fast = cluster.groups[0].device
    slow = replace(fast, name="slow part", peak_flops={"bf16": fast.peak_flops["bf16"] / choose.uniform(1.5, 5)},
                   memory_bandwidth=fast.memory_bandwidth / choose.uniform(1, 3))  # fmt: skip
    counts = choose.choice([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)])
    groups = tuple(Group(device=d, count=n) for d, n in zip(choose.sample([fast, slow], 2), counts, strict=True))
    links = (replace(cluster.links[0], size=sum(counts)),)
    return graph, replace(cluster, groups=groups, links=links), choose.choice([4, 6, 8])


@pytest.mark.parametrize("seed", range(24))
def test_search_finds_the_best_shares(seed):
    """On mixed clusters too, with every number of samples on each kind of device."""
    graph, cluster, batch = mixed_case(seed)
    best = exhaustive(graph, cluster, batch)
    if best is None:
        with pytest.raises(PlanError, match="no plan fits"):
            search(graph, cluster, batch=batch, precision="bf16", space=REDUCED, top=1)
        return

    found = search(graph, cluster, batch=batch, precision="bf16", space=REDUCED, top=1)

    assert found.estimate.step_time_s == pytest.approx(best, rel=1e-9)


def test_plans_come_best_first():
    """The runners-up are slower, all fit, and each is complete."""
    found = search(GRAPH, named_cluster("16xA100"), batch=64, top=4)
    times = [entry.step_time_s for entry in found.plans]

    assert times == sorted(times)
    assert all(entry.fits for entry in found.plans)
    assert found.best == found.plans[0].plan
    assert estimate(GRAPH, named_cluster("16xA100"), found.best, 64).step_time_s == pytest.approx(times[0])


def test_the_front_is_a_front():
    """No plan on it is beaten in time, memory and dollars by another."""
    front = search(GRAPH, named_cluster("16xA100"), batch=64).pareto
    for a, b in itertools.permutations(front, 2):
        assert a.step_time_s > b.step_time_s or a.peak_memory > b.peak_memory or a.usd_per_step > b.usd_per_step


def test_refusals_have_reasons():
    """What is left out says why, with an example."""
    found = search(GRAPH, named_cluster("32xA100"), batch=64, space=Space(tp=(1, 3, 16)))
    reasons = {refusal.reason for refusal in found.refused}

    assert any("16 attention heads do not divide by 3" in reason for reason in reasons)
    assert any("would leave the fast network" in reason for reason in reasons)


def test_a_model_that_fits_nowhere_says_how_much_is_missing():
    """The smallest shortfall, its parts and a way out."""
    huge = build_graph(Architecture(name="huge", layers=48, hidden=12288, ffn_hidden=49152, heads=96, kv_heads=96,
                                    head_dim=128, vocab=50304, seq_len=2048))  # fmt: skip
    with pytest.raises(PlanError, match=r"no plan fits: the smallest needs [\d.]+ GiB on pipeline rank") as problem:
        search(huge, named_cluster("2xA100"), batch=4)
    assert "optimizer" in problem.value.message
    assert "devices of this kind" in problem.value.hint
    assert problem.value.exit_status == 2


def test_a_batch_that_does_not_divide_is_refused():
    """Seven samples cannot be spread evenly over eight devices without a pipeline that is long enough."""
    with pytest.raises(PlanError, match="no plan is legal"):
        search(GRAPH, named_cluster("8xA100"), batch=7, space=Space(pp=(1,), tp=(1,), cp=(1,), idle=0.0))


def test_only_executable_plans_on_request():
    """`train` gets plans it can run."""
    found = search(GRAPH, named_cluster("8xA100"), batch=16, space=Space(executable=True))

    assert all(not unsupported(entry.plan) for entry in found.plans)


def test_mixed_devices_get_unequal_stages():
    """The slower group of a mixed cluster gets fewer layers."""
    found = search(GRAPH, named_cluster("8xH100+8xV100"), batch=64, precision="fp16",
                   space=Space(pp=(2,), tp=(1,), cp=(1,), schedules=("1f1b",), recompute=("none",)))  # fmt: skip

    assert found.best.cuts[0] > 4


def test_inference_parts_cannot_train():
    """A part that only runs compiled graphs is refused."""
    device = Device(name="chip", peak_flops={"bf16": 1e12}, trains=False)
    with pytest.raises(HardwareError, match="cannot train"):
        search(GRAPH, Cluster(name="x", groups=(Group(device=device, count=1),), links=()), batch=8)


def test_experts_are_spread():
    """A mixture's experts are divided over replicas where that pays."""
    moe = build_graph(Architecture(name="moe", layers=4, hidden=1024, ffn_hidden=4096, heads=16, kv_heads=16, head_dim=64,
                                   vocab=8192, seq_len=512, experts=8, topk=2, expert_ffn=4096))  # fmt: skip
    found = search(moe, named_cluster("8xH100"), batch=32, top=50)

    assert any(entry.plan.ep > 1 for entry in (*found.plans, *found.pareto))


@pytest.mark.slow
def test_large_searches_take_seconds():
    """175 billion parameters on 4,096 A100 in under ten seconds of one core."""
    import time

    gpt = build_graph(Architecture(name="gpt-175b", layers=96, hidden=12288, ffn_hidden=49152, heads=96, kv_heads=96,
                                   head_dim=128, vocab=50304, seq_len=2048, gated=False, learned_positions=True))  # fmt: skip
    began = time.process_time()
    found = search(gpt, named_cluster("4096xA100-SXM-80GB"), batch=1536)

    assert time.process_time() - began < 10
    assert found.best.devices > 0.9 * 4096
