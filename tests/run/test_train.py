"""Training: the same losses again, under every plan, after a stop, and with a last batch that is smaller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from plait.schema import Plan

if TYPE_CHECKING:
    from plait.run.processes import Workers

pytestmark = pytest.mark.multi


def _train(workers: Workers, plan: str, folder: Path, /, job: dict[str, Any] | None = None, **options: Any) -> Any:
    from training import trained

    devices = Plan.parse(plan).devices
    return workers.call(trained, plan, str(folder), options, job or {}, devices=devices, timeout=120)[0]


def test_every_sample_counts_once(workers: Workers, tmp_path: Path) -> None:
    """22 samples in batches of 8: the last 6 are trained with their own weight, under replicas and stages alike."""
    alone = _train(workers, "dp=1", tmp_path / "one", steps=6)
    spread = _train(workers, "dp=2,pp=2,microbatches=2", tmp_path / "four", steps=6)

    assert spread["losses"] == pytest.approx(alone["losses"], rel=1e-6)


@pytest.mark.parametrize("plan", ["fsdp=2,tp=2", "dp=2,pp=2,microbatches=2"])
def test_resume_continues_the_very_losses(workers: Workers, tmp_path: Path, plan: str) -> None:
    """Stopped after 4 of 8 steps and resumed: bit-identical, with dropout, momentum and a decaying rate."""
    whole = _train(workers, plan, tmp_path / "whole", {"dropout": 0.2}, steps=8, seed=3)
    first = _train(workers, plan, tmp_path / "parts", {"dropout": 0.2}, steps=4, seed=3)
    second = _train(workers, plan, tmp_path / "parts", {"dropout": 0.2}, steps=8, seed=3, resume=True)

    assert first["losses"] + second["losses"] == whole["losses"]


def test_resume_without_a_checkpoint_starts(workers: Workers, tmp_path: Path) -> None:
    """There is nothing to continue from, so it starts, and says so."""
    summary = _train(workers, "dp=2", tmp_path, steps=2, resume=True)

    assert summary["steps"] == 2
    assert summary["resumed_from"] is None


def test_evaluation_uses_no_dropout(workers: Workers, tmp_path: Path) -> None:
    """Held-out loss is the same under one device and four, whatever the dropout drew."""
    from training import data

    job = {"dropout": 0.5, "rate": 0.0, "evaluate": data()}
    alone = _train(workers, "dp=1", tmp_path / "one", job, steps=1)
    spread = _train(workers, "dp=2,pp=2", tmp_path / "four", job, steps=1)

    assert spread["evaluation_loss"] == pytest.approx(alone["evaluation_loss"], rel=1e-6)


def test_a_loss_that_is_not_finite_stops(workers: Workers, tmp_path: Path) -> None:
    """The step and the first parameter are named, and the last checkpoint is still there to resume from."""
    from training import poisoned

    from plait.run.checkpoint import latest

    summary = workers.call(poisoned, "dp=2", str(tmp_path), devices=2, timeout=120)[0]

    assert summary["kind"] == "DivergedError"
    assert summary["error"].startswith("step 3: the loss is nan")
    assert "the gradient of 0.weight" in summary["error"]
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-00000002"


def test_a_checkpoint_of_another_model_is_refused(workers: Workers, tmp_path: Path) -> None:
    """It names the first parameter that does not fit."""
    _train(workers, "dp=2", tmp_path, steps=1)
    other = _train(workers, "dp=2", tmp_path, {"width": 12}, steps=2, resume=True)

    assert other["kind"] == "CheckpointError"
    assert "0.weight" in other["error"]


def test_a_truncated_checkpoint_is_refused(workers: Workers, tmp_path: Path) -> None:
    """It says which file is broken, and nothing is trained from it."""
    _train(workers, "dp=2", tmp_path, steps=1)
    piece = next((tmp_path / "checkpoints").glob("step-*/rank-*.safetensors"))
    piece.write_bytes(piece.read_bytes()[:100])
    again = _train(workers, "dp=2", tmp_path, steps=2, resume=True)

    assert again["kind"] == "CheckpointError"
    assert piece.name in again["error"]


def test_the_log_can_be_read(workers: Workers, tmp_path: Path) -> None:
    """One JSON object a step."""
    summary = _train(workers, "dp=2", tmp_path, steps=3)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    assert [row["loss"] for row in rows if "loss" in row] == summary["losses"]


def test_dropout_differs_between_replicas_only(workers: Workers) -> None:
    """Replicas drop other elements; processes that share samples drop the same."""
    from training import dropped

    first, second = workers.call(dropped, "dp=2", devices=2, timeout=60)
    one, other = workers.call(dropped, "tp=2", devices=2, timeout=60)

    assert first != second
    assert len(set(first)) > 1
    assert one == other


@pytest.mark.parametrize(
    ("plan", "name", "words"),
    [
        ("fsdp=2", "adafactor", "Adafactor looks across"),
        ("fsdp=2", "muon", "Muon"),
        ("dp=2", "lbfgs", "LBFGS"),
        ("pp=2", "adafactor", ""),
        ("fsdp=2", "sgd", ""),
    ],
)
def test_optimizers_that_look_across_are_refused_on_shards(workers: Workers, plan: str, name: str, words: str) -> None:
    """By name where the plan splits what they look at; element-wise ones run."""
    from training import optimizer_refused

    said = workers.call(optimizer_refused, plan, name, devices=2, timeout=120)[0]

    assert (words in said) if words else said == ""
