"""Serving under a plan gives the plain model's eval-mode outputs, whole, in their own structure, for any batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from plait.schema import Plan

if TYPE_CHECKING:
    from plait.run.processes import Workers

pytestmark = pytest.mark.multi

ROOT = Path(__file__).resolve().parents[2]
OWN = f"{ROOT}/tests/run/difficulties.py:"
TEXT = "num_hidden_layers=2&hidden_size=32&num_attention_heads=4&intermediate_size=64&vocab_size=99&seq_len=16"
SERVING = f"{ROOT}/tests/run/serving.py:structured"
T5 = "hf:t5?num_layers=2&num_decoder_layers=2&d_model=32&num_heads=4&d_kv=8&d_ff=64&vocab_size=99&seq_len=16"

HOLDS = [
    (f"hf:llama?{TEXT}&num_key_value_heads=2", "tp=2,pp=2,microbatches=2", 5),
    (f"hf:llama?{TEXT}&num_key_value_heads=2", "tp=2,pp=2,precision=bf16", 4),
    (f"hf:bert?{TEXT}", "fsdp=2,tp=2", 4),
    (T5, "tp=2,pp=2,microbatches=2", 4),
    (SERVING, "dp=2,pp=2,microbatches=2", 9),
    (SERVING, "fsdp=2,tp=2,microbatches=3", 6),
    (OWN + "tied", "pp=2,interleave=2,microbatches=4", 11),
    (OWN + "batchnorm?dropout=0.3", "dp=2,microbatches=2", 4),
    (OWN + "rigid", "dp=2,pp=2,microbatches=2", 8),
    (OWN + "counting", "pp=2", 8),
    (OWN + "branching", "fsdp=2", 8),
]


@pytest.mark.parametrize(("target", "plan", "batch"), HOLDS)
def test_outputs_are_those_of_the_plain_model(workers: Workers, target: str, plan: str, batch: int) -> None:
    """Every output, at the batch and at one that the plan does not divide."""
    from serving import forward_verdict

    verdict = workers.call(forward_verdict, target, plan, batch, devices=Plan.parse(plan).devices, timeout=300)[0]

    assert not isinstance(verdict, str), verdict
    assert verdict["ok"], verdict
    assert verdict["outputs"]


@pytest.mark.parametrize("to", ["all", "first"])
def test_outputs_keep_their_structure_and_order(workers: Workers, to: str) -> None:
    """Batches smaller than the plan, one of a single sample, one that does not divide; in every process or the first."""
    from serving import Structured, outputs_of

    torch.manual_seed(0)
    module = Structured().eval()
    sizes = [5, 1, 3]
    everyone = workers.call(outputs_of, "dp=2,pp=2,microbatches=2", sizes, to, devices=4, timeout=300)
    for rank, given in enumerate(everyone):
        *outputs, refusal = given

        assert "train=False" in refusal
        if to == "first" and rank:
            assert outputs == [None] * 3
            continue
        for size, got in zip(sizes, outputs, strict=True):
            with torch.no_grad():
                expected = module(torch.arange(8.0 * size).reshape(size, 8) / 9)
            _assert_same(got, expected)


def _assert_same(got: Any, expected: Any) -> None:
    assert list(got) == list(expected)
    assert got["none"] is None
    assert got["number"] == 7
    pairs = [(got[k], expected[k]) for k in ("scores", "flat", "input", "scale")]
    pairs += [(got["nested"][0], expected["nested"][0])]
    pairs += list(zip(got["nested"][1], expected["nested"][1], strict=True))
    for a, b in pairs:
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_serves_the_weights_of_a_run_under_another_plan(workers: Workers, tmp_path: Path) -> None:
    """Trained with batch norm under dp, served from its run directory under pp, statistics and all."""
    from serving import trained_then_served

    target = OWN + "batchnorm"
    workers.call(trained_then_served, target, str(tmp_path), "dp=2", "", devices=2, timeout=300)
    verdict = workers.call(trained_then_served, target, str(tmp_path), None, "pp=2", devices=2, timeout=300)[0]

    assert isinstance(verdict, dict), verdict
    assert verdict["ok"], verdict


def test_a_checkpoint_of_another_model_is_refused(workers: Workers, tmp_path: Path) -> None:
    """Names the tensor; and a folder without a checkpoint says what is wanted."""
    from serving import trained_then_served

    empty = workers.call(trained_then_served, OWN + "chain", str(tmp_path), None, "dp=2", devices=2, timeout=300)[0]
    workers.call(trained_then_served, OWN + "chain", str(tmp_path), "dp=2", "", devices=2, timeout=300)
    other = workers.call(trained_then_served, OWN + "batchnorm", str(tmp_path), None, "dp=2", devices=2, timeout=300)[0]

    assert "no complete checkpoint" in empty
    assert "layers.0.weight does not fit the model" in other


def test_an_output_over_the_batch_is_refused_where_the_batch_is_cut(workers: Workers) -> None:
    """[samples, samples] cannot be put together from parts; uncut it is served."""
    from serving import forward_verdict

    target = SERVING + "?kind=Together"
    refusal = workers.call(forward_verdict, target, "dp=2", 4, devices=2, timeout=300)[0]
    whole = workers.call(forward_verdict, target, "pp=2,microbatches=1", 4, devices=2, timeout=300)[0]

    assert "2 dimensions that grow with the batch" in refusal
    assert isinstance(whole, dict), whole
    assert whole["ok"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("width", "captured for [*, 8]"),
        ("dtype", "captured for torch.float32"),
        ("kind", "inputs"),
        ("empty", "an empty batch"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(workers: Workers, what: str, words: str) -> None:
    """With what was given and what is wanted."""
    from serving import refused

    assert words in workers.call(refused, what, devices=1, timeout=300)[0]


def test_verify_forward_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON object; an option that belongs to --forward alone is refused without it."""
    import json

    from plait.cli.main import run

    status = run(["verify", OWN + "chain", "--devices", "2", "--plan", "tp=2", "--forward", "--json"])
    result = json.loads(capsys.readouterr().out)
    refused = run(["verify", OWN + "chain", "--devices", "1", "--plan", "dp=1", "--weights", "nowhere"])
    missing = run(["verify", OWN + "chain", "--devices", "1", "--plan", "dp=1", "--forward", "--weights", "nowhere"])

    assert status == 0
    assert result["ok"]
    assert result["max_output_rel_err"] <= result["tolerance"]
    assert refused == missing == 2
    assert "no such directory" in capsys.readouterr().err
