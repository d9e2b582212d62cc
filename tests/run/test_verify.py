"""Plans compute what one device computes; what is broken on purpose is seen and named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from plait.schema import Plan

if TYPE_CHECKING:
    from plait.run.processes import Workers
    from plait.run.verify import Verdict

pytestmark = pytest.mark.multi

ROOT = Path(__file__).resolve().parents[2]
OWN = f"{ROOT}/tests/run/difficulties.py:"
EXAMPLES = f"{ROOT}/examples/"
TEXT = "num_hidden_layers=2&hidden_size=32&num_attention_heads=4&intermediate_size=64&vocab_size=99&seq_len=16"

HOLDS = [
    # the difficulty of each model is in its own docstring
    (OWN + "tied", "dp=2,pp=2", 8),
    (OWN + "tied", "tp=2,pp=2,recompute=selective", 11),
    (OWN + "twice", "pp=4", 8),
    (OWN + "batchnorm", "dp=2,microbatches=2,batch_shares=3:1", 16),
    (OWN + "clipped", "fsdp=2,pp=2,microbatches=2,batch_shares=1:2", 11),
    (OWN + "tied_on_one_process", "dp=2,pp=2,interleave=2,schedule=interleaved", 16),
    (OWN + "unused", "fsdp=2,pp=2", 8),
    (OWN + "spectral_norm", "fsdp=2", 8),
    (OWN + "keywords", "dp=2,pp=2", 8),
    (OWN + "ignored", "dp=2,pp=2,microbatches=4", 9),
    (OWN + "scalars", "fsdp=2", 8),
    (OWN + "complex_values", "pp=2", 8),
    (OWN + "mixed", "fsdp=2,zero=2", 8),
    (OWN + "in_place", "pp=2,recompute=full", 8),
    (OWN + "rigid", "dp=2,pp=2,microbatches=2", 7),
    (OWN + "batchnorm?dropout=0.3", "fsdp=2,recompute=full,microbatches=2", 8),
    (OWN + "batchnorm", "dp=2,pp=2,microbatches=2,recompute=selective", 10),
    (OWN + "recurrent", "pp=2,schedule=gpipe", 8),
    (OWN + "noisy", "pp=2,schedule=interleaved,interleave=2", 8),
    (OWN + "stateless", "pp=2,schedule=zerobubble,interleave=2", 11),
    (OWN + "clipped", "fsdp=2,tp=2,microbatches=2", 8),
    (OWN + "branching", "fsdp=2", 8),
    (EXAMPLES + "unet.py:job?width=4&samples=32", "pp=2", 8),
    (EXAMPLES + "dlrm.py:job?tables=4&rows=50&samples=200", "tp=2,pp=2", 8),
    (f"hf:llama?{TEXT}&num_key_value_heads=2", "tp=2,pp=2", 8),
    (f"hf:bert?{TEXT}", "fsdp=2,tp=2", 8),
    (
        "hf:t5?num_layers=2&num_decoder_layers=2&d_model=32&num_heads=4&d_kv=8&d_ff=64&vocab_size=99&seq_len=16",
        "dp=2,pp=2",
        8,
    ),
]


def _verdict(workers: Workers, target: str, plan: str, batch: int = 8, broken: str = "") -> Verdict | str:
    from checking import verdict_of

    devices = Plan.parse(plan).devices
    return workers.call(verdict_of, target, plan, batch, 2, broken, devices=devices, timeout=120)[0]


@pytest.mark.parametrize(
    ("target", "plan", "batch"), HOLDS, ids=[f"{Path(t).name.partition('?')[0]}-{p}" for t, p, _ in HOLDS]
)
def test_holds(workers: Workers, target: str, plan: str, batch: int) -> None:
    """Losses, gradients and parameters within 1e-5."""
    verdict = _verdict(workers, target, plan, batch)

    assert not isinstance(verdict, str), verdict
    assert verdict.ok, verdict
    assert verdict.tolerance == 1e-5


@pytest.mark.parametrize(
    ("broken", "target", "plan", "named"),
    [
        ("reduction", "chain", "dp=2", "layers.0.weight"),
        ("ties", "tied", "pp=2", "table.weight"),
        ("weights", "chain", "pp=2,microbatches=3", "layers."),
        ("seed", "chain", "fsdp=2", "layers.1.weight"),
        ("seed", "chain", "tp=2", "layers.1.weight"),
        ("gradient", "chain", "dp=2", "layers.1.bias"),
    ],
)
def test_what_is_broken_is_seen_and_named(workers: Workers, broken: str, target: str, plan: str, named: str) -> None:
    """The same case holds when nothing is broken; broken, the parameter stands first among the worst."""
    whole = _verdict(workers, OWN + target, plan, 7)
    verdict = _verdict(workers, OWN + target, plan, 7, broken)

    assert not isinstance(whole, str)
    assert whole.ok, whole
    assert not isinstance(verdict, str)
    assert not verdict.ok
    assert str(verdict.worst[0]["name"]).startswith(named), verdict.worst


def test_a_loss_that_is_no_mean_of_its_parts_is_said_to_be_one(workers: Workers) -> None:
    """A contrastive loss compares samples with each other."""
    verdict = _verdict(workers, OWN + "contrastive", "dp=2")

    assert not isinstance(verdict, str)
    assert not verdict.ok
    assert any("no weighted mean of its parts" in note for note in verdict.notes)


def test_a_mean_over_tokens_needs_its_weight(workers: Workers) -> None:
    """Without `loss_weight` the parts of a batch have another number of tokens that count."""
    verdict = _verdict(workers, OWN + "ignored?weighted=no", "dp=2")

    assert not isinstance(verdict, str)
    assert not verdict.ok
    assert any("loss_weight" in note for note in verdict.notes)


def test_batch_norm_over_microbatches_is_one_device_accumulating_them(workers: Workers) -> None:
    """And the verdict says so."""
    verdict = _verdict(workers, OWN + "batchnorm", "pp=2,microbatches=2")

    assert not isinstance(verdict, str)
    assert verdict.ok
    assert verdict.microbatches_on_one_device == 2
    assert any("depends on how a batch is cut" in note for note in verdict.notes)


def test_refusals_name_the_cause(workers: Workers) -> None:
    """Control flow on data, and a model that raises by itself."""
    uncaptured = _verdict(workers, OWN + "branching", "pp=2")
    raising = _verdict(workers, OWN + "raising", "dp=2")

    assert isinstance(uncaptured, str)
    assert "difficulties.py" in uncaptured
    assert "x.sum() > 0" in uncaptured
    assert isinstance(raising, str)
    assert "the model itself raises on one device: ValueError: no such thing" in raising
