"""Experts of a captured mixture are matmuls with weights, whatever kernel the processor runs them with."""

from __future__ import annotations

from plait.capture.target import load_target
from plait.capture.trace import trace
from plait.cost.serving_work import served_work


def test_experts_are_counted():
    """Two of eight experts for each token: FLOP, weights and cache of a tiny mixtral by hand."""
    job = load_target(
        "hf:mixtral?num_hidden_layers=1&hidden_size=64&intermediate_size=96&num_attention_heads=4&num_key_value_heads=2"
        "&vocab_size=128&seq_len=16"
    )
    graph = trace(job).graph
    experts = [op for s in graph.segments for op in s.operators if "grouped_mm" in op.target]
    work = served_work(graph)

    assert {op.kind for op in experts} == {"matmul"}
    assert all(op.parameters for op in experts)
    assert sum(op.flops for op in experts) == 2 * graph.batch * 16 * 2 * 3 * 64 * 96
    assert work.experts.weights == 8 * 3 * 64 * 96
    assert work.experts.active == 2
    assert work.cached == 2 * 2 * 16
