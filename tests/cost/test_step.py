from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cost.architecture import Architecture, build_graph
from plait.cost.partition import default_cuts
from plait.cost.step import estimate
from plait.errors import HardwareError, PlanError
from plait.hardware.clusters import named_cluster
from plait.schema import Cluster, Device, Group, Link, Plan

SMALL = Architecture(
    name="small", layers=8, hidden=1024, ffn_hidden=4096, heads=16, kv_heads=16, head_dim=64, vocab=8192, seq_len=512
)
GRAPH = build_graph(SMALL)
A100 = named_cluster("16xA100")


def predict(spec, batch=32, cluster=A100, graph=GRAPH):
    return estimate(graph, cluster, Plan.parse(spec + ",precision=bf16"), batch)


def test_parts_add_up():
    """The breakdown is the step."""
    found = predict("dp=2,fsdp=2,tp=2,pp=2,zero=1,microbatches=4,recompute=full")

    assert found.breakdown.total == pytest.approx(found.step_time_s)
    assert found.tokens_per_s == pytest.approx(32 * 512 / found.step_time_s)
    assert 0 < found.mfu < 1


@pytest.mark.parametrize("zero", [1, 2])
def test_more_sharding_needs_less_memory(zero):
    """Each degree of ZeRO keeps a larger part only once."""
    less, more = (predict(f"fsdp=16,zero={z}") for z in (zero, zero + 1))

    assert more.memory[0].gradients + more.memory[0].parameters < less.memory[0].gradients + less.memory[0].parameters


def test_optimizer_state_is_counted_once_under_zero_1():
    """Sixteen shards hold a sixteenth each."""
    assert predict("fsdp=16,zero=1").memory[0].optimizer == pytest.approx(predict("dp=16").memory[0].optimizer / 16)


def test_recomputation_trades_time_for_memory():
    """Less is kept, more is done."""
    none, selective, full = (predict(f"dp=4,pp=4,microbatches=8,recompute={r}") for r in ("none", "selective", "full"))

    assert none.step_time_s < selective.step_time_s < full.step_time_s
    assert none.peak_memory > selective.peak_memory > full.peak_memory


def test_recompute_by_segment_lies_between():
    """Recomputing some segments costs some."""
    plan = Plan.parse("dp=16,precision=bf16")
    some = replace(plan, recompute_segments={"1": "full", "2": "full"})
    times = [estimate(GRAPH, A100, p, 32).step_time_s for p in (plan, some, replace(plan, recompute="full"))]

    assert times[0] < times[1] < times[2]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["dp=16", "fsdp=16", "tp=8,dp=2", "pp=4,dp=4,microbatches=8", "cp=2,dp=8"]), st.floats(1.0, 8.0))
def test_faster_hardware_is_never_slower(spec, factor):
    """More bandwidth on every level, or a higher peak, does not cost time."""
    links = tuple(replace(link, bandwidth=link.bandwidth * factor) for link in A100.links)
    device = A100.groups[0].device
    peak = replace(device, peak_flops={k: v * factor for k, v in device.peak_flops.items()})
    base = predict(spec).step_time_s

    assert predict(spec, cluster=replace(A100, links=links)).step_time_s <= base * (1 + 1e-9)
    quicker = replace(A100, groups=(replace(A100.groups[0], device=peak),))
    assert predict(spec, cluster=quicker).step_time_s <= base * (1 + 1e-9)


def test_first_ranks_hold_most_microbatches():
    """Under 1F1B the first stage keeps activations of as many microbatches as there are stages."""
    found = predict("pp=4,dp=4,microbatches=8")

    assert found.memory[0].activations > 2 * found.memory[3].activations


def test_tied_weights_are_counted_once_on_one_rank():
    """A table that the output shares is one parameter where both lie on the same rank."""
    tied = build_graph(
        Architecture(**{**{n: getattr(SMALL, n) for n in Architecture.__dataclass_fields__}, "tied": True})
    )

    once, twice = predict("dp=16", graph=tied).memory[0].parameters, predict("dp=16").memory[0].parameters
    assert twice - once == pytest.approx(4 * 8192 * 1024)


def test_open_cuts_are_filled_in():
    """A plan that does not say where to cut is cut by cost, and says where."""
    found = predict("pp=4,dp=4,microbatches=8")

    assert found.plan.cuts == default_cuts(GRAPH, 4)
    assert len(found.plan.cuts) == 3


def test_a_plan_larger_than_the_cluster_is_refused():
    """Seventeen devices are not sixteen."""
    with pytest.raises(PlanError, match="needs 32 devices, 16xA100 has 16"):
        predict("dp=32")


def test_a_missing_figure_is_named():
    """A part without a bf16 rate cannot be planned on in bf16."""
    device = Device(name="mystery", peak_flops={"fp32": 1e13}, memory_bandwidth=1e12)
    cluster = Cluster(name="x", groups=(Group(device=device, count=1),), links=())
    with pytest.raises(HardwareError, match="mystery: its bf16 rate is not known"):
        predict("dp=1", cluster=cluster)
    unknown = Device(name="mystery", peak_flops={"bf16": 1e13})
    with pytest.raises(HardwareError, match="mystery: its memory_bandwidth is not known"):
        predict("dp=1", cluster=Cluster(name="x", groups=(Group(device=unknown, count=1),), links=()))


def test_processes_that_share_cores_share_their_speed():
    """Four processes on two cores take twice as long as on four."""
    device = Device(name="cpu", category="cpu", peak_flops={"bf16": 1e11}, memory_bandwidth=1e10, memory_bytes=64e9)
    links = (Link(level="node", size=4, bandwidth=1e9, latency=1e-4),)
    own = Cluster(name="own", groups=(Group(device=device, count=4),), links=links)

    alone, shared = predict("dp=4", cluster=own), predict("dp=4", cluster=replace(own, shared_cores=2))
    assert shared.step_time_s > 1.8 * alone.step_time_s


def test_mixed_clusters_are_as_fast_as_their_stages():
    """A pipeline over two kinds of device: the slower kind's stage decides unless it gets fewer layers."""
    mixed = named_cluster("8xH100+8xV100")
    wide = build_graph(Architecture(name="wide", layers=8, hidden=4096, ffn_hidden=16384, heads=32, kv_heads=32, head_dim=128,
                                    vocab=8192, seq_len=2048))  # fmt: skip
    even = Plan.parse("pp=2,dp=8,microbatches=4,precision=fp16")
    slow, quick = (estimate(wide, mixed, replace(even, cuts=(c,)), 64).step_time_s for c in (5, 7))

    assert quick < slow


def test_a_hundred_thousand_devices_are_no_more_work():
    """Identical layers are costed once: a large estimate takes milliseconds."""
    import time

    large = build_graph(Architecture(name="l", layers=96, hidden=12288, ffn_hidden=49152, heads=96, kv_heads=96,
                                     head_dim=128, vocab=50304, seq_len=2048))  # fmt: skip
    cluster = named_cluster("98304xH100")
    began = time.process_time()
    estimate(large, cluster, Plan.parse("fsdp=512,tp=8,pp=24,zero=1,microbatches=24,precision=bf16"), 12288)

    assert time.process_time() - began < 0.5
