"""What is decided, without running it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import harness
import pytest

from plait.run.shard import decide, lower


@pytest.fixture(scope="module")
def decoder() -> Any:
    """The captured decoder."""
    model, inputs = harness.build("decoder_chunk")
    return harness.capture(model, inputs)


def test_the_hand_written_layout_is_found(decoder: Any) -> None:
    """Columns, rows, and each of queries, keys and values by itself; the odd vocabulary unevenly."""
    module, placeholders, _ = decoder
    decisions = decide(module, placeholders, 2)
    stored = {placeholders[name].name: repr(placement) for name, placement in decisions.stored.items()}

    assert not decisions.whole
    assert stored["model.blocks.0.qkv.weight"] == "sharded(0: 32)"
    assert stored["model.blocks.0.qkv.bias"] == "sharded(0: 32)"
    assert stored["model.blocks.0.out.weight"] == "sharded(1: 32)"
    assert stored["model.blocks.0.up.weight"] == "sharded(0: 128)"
    assert stored["model.blocks.0.down.weight"] == "sharded(1: 128)"
    assert stored["model.table.weight"] == "sharded(0: 97)"
    assert "model.blocks.0.down.bias" not in stored


def test_deciding_twice_gives_the_same(decoder: Any) -> None:
    """Ranks decide each for itself, and must agree."""
    module, placeholders, _ = decoder
    first, second = decide(module, placeholders, 2), decide(module, placeholders, 2)

    assert first.placements == second.placements
    assert first.stored == second.stored


def test_the_captured_graph_is_left_as_it_is(decoder: Any) -> None:
    """It is lowered once for each rank."""
    module, placeholders, _ = decoder
    before = str(module.graph)
    lower(module, decide(module, placeholders, 2), placeholders, 2, 0)

    assert str(module.graph) == before


def test_lowered_nodes_know_their_segment_and_local_shape(decoder: Any) -> None:
    """The pipeline sizes its messages by them."""
    module, placeholders, _ = decoder
    local, layouts = lower(module, decide(module, placeholders, 2), placeholders, 2, 1)
    nodes = {node.name: node for node in local.graph.nodes}
    for node in local.graph.nodes:
        if node.op == "call_function":
            assert "segment" in node.meta, node
        if node.name in layouts:
            assert tuple(node.meta["val"].shape) == layouts[node.name].local_shape

    assert nodes["linear"].meta["val"].shape[1:] == (16, 48)
    assert nodes["scaled_dot_product_attention"].meta["val"].shape[1:] == (2, 16, 8)
    assert nodes["copy"].meta["val"].shape[1:] == (16, 32)


def test_explanation_names_what_stays_whole() -> None:
    """With the user's own names."""
    model, inputs = harness.build("hf:mixtral")
    module, placeholders, _ = harness.capture(model, inputs)
    decisions = decide(module, placeholders, 2)

    assert any(each.parameter.endswith("layers.0.mlp.gate.weight") for each in decisions.whole)
    assert "stays whole" in decisions.explain()
