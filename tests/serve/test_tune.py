"""The tuner keeps every measurement, its best follows from them, and a record gives the same settings without measuring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plait.errors import ServeError
from plait.serve.export import export
from plait.serve.tune import accurate, load_tuned, tune
from plait.serve.tune_record import Configuration, Record


def _configuration(threads: int = 1, artefact: str = "a") -> dict[str, Any]:
    return {"artefact": artefact, "threads": threads, "cpus": [], "batch": 2, "wait": "", "knobs": {}}


def _trial(threads: int, *rounds: list[float]) -> dict[str, Any]:
    kept = [{"round": i + 1, "seconds": seconds} for i, seconds in enumerate(rounds)]
    return {"configuration": _configuration(threads), "rounds": kept, "error": ""}


def _record(*trials: dict[str, Any]) -> Record:
    return Record.of(trials, machine={}, goal="latency", seed=0, seconds=1.0, identities={})


def test_the_best_is_the_fastest_of_those_measured_together() -> None:
    """A lucky moment of an earlier round does not win against the last one."""
    record = _record(_trial(1, [0.001] * 5), _trial(2, [0.004] * 5, [0.003] * 9), _trial(4, [0.004] * 5, [0.002] * 9))

    assert record.best.threads == 4
    assert record.fastest["sample_ms"] == pytest.approx(1.0)
    assert record.default["p50_ms"] == pytest.approx(1.0)


def test_a_record_is_read_back_equal_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    """Its best has to be what its measurements say."""
    path = tmp_path / "tune.json"
    record = _record(_trial(1, [0.002] * 5), _trial(2, [0.001] * 5))
    record.write(path)
    again = Record.read(path)
    data = json.loads(path.read_text())
    data["best"]["threads"] = 1
    path.write_text(json.dumps(data))

    assert again == record
    with pytest.raises(ServeError, match="it was changed"):
        Record.read(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "plait tuning 1"}', '{"format": "other"}'])
def test_a_broken_record_is_refused(text: str, tmp_path: Path) -> None:
    """In one line, with the file."""
    path = tmp_path / "tune.json"
    path.write_text(text)

    with pytest.raises(ServeError, match="malformed"):
        Record.read(path)
    with pytest.raises(ServeError, match="no such file"):
        Record.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("threads", 0), ("threads", "1"), ("cpus", [-1]), ("knobs", {"a": []}), ("wait", "; rm"), ("batch", True)],
)
def test_hostile_settings_are_refused(key: str, value: Any) -> None:
    """They come from a file."""
    with pytest.raises((ValueError, TypeError)):
        Configuration.from_dict({**_configuration(), key: value})


def test_precisions_that_lost_too_much_are_not_tuned() -> None:
    """fp32 always is; int8 by its cosine."""
    rows = [
        {"status": "ok", "precision": "fp32", "folder": "a", "parity": [{"cosine": 1.0}]},
        {"status": "ok", "precision": "int8", "folder": "b", "parity": [{"cosine": 0.98}]},
        {"status": "failed", "precision": "fp32"},
    ]

    assert accurate(rows, 0.99) == [Path("a")]
    assert accurate(rows, 0.9) == [Path("a"), Path("b")]
    with pytest.raises(ServeError, match="cosine"):
        accurate(rows[1:], 0.99)


@pytest.mark.multi
def test_tuning_and_loading_from_the_record(tmp_path: Path) -> None:
    """A short search over a real artefact; then the very settings, without a measurement."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    inputs = torch.randn(2, 16)
    report = export(model, "torch", inputs=inputs, output=tmp_path, batch=(1, 2), threads=1, seconds=0, compiled=False)
    folder = report["rows"][0]["folder"]
    record = tune([folder], seconds=1, batch=2, threads=[1], output=tmp_path / "tune.json")
    served = load_tuned(tmp_path / "tune.json")

    assert record.trials[0]["calls"] >= 15
    assert record.machine["cores"]
    assert Record.read(tmp_path / "tune.json").best == record.best
    torch.testing.assert_close(served(inputs), model(inputs))
    for wrong, words in (
        ({"batch": 3}, "outside of what it serves"),
        ({"threads": [10**6]}, "do not fit"),
        ({"seconds": 0}, "--tune-seconds"),
    ):
        with pytest.raises(ServeError, match=words):
            tune([folder], **{"seconds": 1, "batch": 1, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ServeError, match="no artefact"):
        tune([], seconds=1)
