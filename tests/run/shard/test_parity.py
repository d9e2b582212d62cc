"""Lowered graphs give one device's loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.multi

CASES = [
    *("perceptron", "perceptron_uneven", "decoder_chunk", "decoder_view3", "decoder_heads", "decoder_odd_heads"),
    *("hf:llama", "hf:gpt2"),
]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_does(pair: Any, case: str) -> None:
    """Loss and every gradient within 1e-5; whole parameters' gradients are bit-identical on all ranks."""
    for outcome in pair.run(case):
        assert outcome.is_exact, outcome


@pytest.mark.parametrize("case", ["decoder_chunk", "decoder_view3", "hf:llama", "hf:gpt2"])
def test_a_layer_has_the_collectives_of_the_hand_written_layout(pair: Any, case: str) -> None:
    """Two all-reduces forward and two backward for each of the 2 layers.

    Beside these: the sum of the vocabulary-sharded table's rows, two small ones in the cross entropy, and the
    gradient that enters the output projection.
    """
    outcome = pair.run(case)[0]

    assert outcome.forward == {"all_reduce": 2 * 2 + 1 + 2}
    assert outcome.backward == {"all_reduce": 2 * 2 + 1}
