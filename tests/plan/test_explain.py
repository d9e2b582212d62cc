from __future__ import annotations

from plait.cost.architecture import Architecture, build_graph
from plait.hardware.clusters import named_cluster
from plait.plan.explain import explain, resized
from plait.plan.search import search
from plait.plan.space import Space

GRAPH = build_graph(
    Architecture(
        name="gpt", layers=6, hidden=1024, ffn_hidden=4096, heads=16, kv_heads=16, head_dim=64, vocab=16384, seq_len=512
    )
)


def test_an_explanation_answers_the_questions():
    """Which resource binds, why not the next plan, what other numbers of devices would do."""
    cluster = named_cluster("8xA100")
    told = explain(search(GRAPH, cluster, batch=64), GRAPH, cluster, other_counts=(4, 16, 5))

    text = "\n".join(told.lines)
    assert "binds: " in text
    assert "% slower, mostly by" in text
    assert told.devices[4] > told.devices[16]
    assert "with 5 devices" in text


def test_clusters_grow_and_shrink():
    """A node more or less keeps the links' levels."""
    base = named_cluster("16xA100")

    assert [(link.level, link.size) for link in resized(base, 24).links] == [("node", 8), ("site", 24)]
    assert resized(base, 8).devices == 8
    assert resized(named_cluster("8xH100+8xV100"), 8).groups[0].device.name == "NVIDIA H100 SXM5"


def test_what_binds_is_named_once():
    """A pipeline that mostly waits binds first, and something else second."""
    cluster = named_cluster("8xA100")
    space = Space(pp=(4,), tp=(1,), cp=(1,), schedules=("1f1b",), microbatch_sizes=(2,))
    lines = explain(search(GRAPH, cluster, batch=4, space=space), GRAPH, cluster, other_counts=()).lines
    line = next(line for line in lines if line.startswith("binds: "))

    assert line.count("bubble") == 1
