"""Lowered graphs give one device's loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.multi

CASES = [
    *("perceptron", "perceptron_uneven", "decoder_chunk", "decoder_view3", "decoder_heads", "decoder_odd_heads"),
    *("convnet", "in_place", "odd", "translator", "recurrent", "recommender"),
    *(f"hf:{kind}" for kind in ("llama", "gpt2", "phi3", "mixtral", "mamba", "t5", "wav2vec2")),
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


@pytest.mark.parametrize("case", ["perceptron_uneven", "decoder_chunk", "hf:llama"])
def test_four_ranks_compute_what_one_does(four: Any, case: str) -> None:
    """Also where sizes do not divide by four, and with fewer key heads than ranks."""
    for outcome in four.run(case):
        assert outcome.is_exact, outcome


def test_side_by_side_attention_and_mlp_share_their_collectives(pair: Any) -> None:
    """Where both read the same norm, one all-reduce a layer is enough each way."""
    outcome = pair.run("hf:gptj")[0]

    assert outcome.is_exact, outcome
    assert outcome.forward == {"all_reduce": 2 + 1 + 2 + 2}  # its biases keep attention and MLP apart forward
    assert outcome.backward == {"all_reduce": 2 + 1}


def test_state_space_layers_are_split_whole(pair: Any) -> None:
    """A layer of mamba: in-projection by columns, out by rows, and one sum of the small projection between."""
    outcome = pair.run("hf:mamba")[0]

    assert outcome.sharded > 0.99
    assert outcome.forward == {"all_reduce": 2 * 2 + 1 + 2}
    assert outcome.backward == {"all_reduce": 2 * 2 + 1}


def test_dropout_differs_on_slices_and_agrees_on_whole_values(pair: Any) -> None:
    """And the default generators stay in step, so that recomputation and later numbers agree."""
    first, second = pair.run("noisy", function="run_noise")

    assert not first.problem, first.problem
    assert [v == 0 for v in first.sharded] != [v == 0 for v in second.sharded]
    assert first.whole == second.whole
    assert first.next_number == second.next_number
    assert first.losses[0] == first.losses[1] == second.losses[0] == second.losses[1]
    assert max(first.recomputed, second.recomputed) == 0.0
