"""The whole flow once, in under a minute: capture, estimate, verify, train, stop, resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import plait
from plait.capture.target import load_target

ROOT = Path(__file__).parent.parent
TARGET = "examples/gpt.py:job?layers=4&width=64&length=16"


def command(*words: str) -> dict[str, Any]:
    """The JSON object that `plait WORDS --json` prints; nothing else may be on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "plait", *words, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_capture():
    """The model becomes a chain of segments that survives a round trip through JSON."""
    graph = plait.trace(load_target(f"{ROOT}/{TARGET}")).graph

    assert graph is not None
    assert len(graph.segments) >= 4
    assert graph.flops > 0
    assert plait.Graph.from_json(graph.to_json()) == graph


@pytest.mark.multi
def test_verify():
    """Two replicas of two stages compute what one device computes."""
    verdict = command("verify", TARGET, "--devices", "4", "--plan", "dp=2,pp=2", "--steps", "2", "--batch", "8")

    assert verdict["ok"]
    assert verdict["captured"]
    assert verdict["max_grad_rel_err"] < 1e-5


@pytest.mark.multi
def test_train_and_resume(tmp_path: Path):
    """Six steps with a stop after three are six steps: the loss is the same to the last digit."""
    plan = ["--devices", "2", "--plan", "pp=2", "--batch", "8", "--seed", "1"]
    whole = command("train", TARGET, *plan, "--steps", "6", "--run-dir", str(tmp_path / "whole"))
    command("train", TARGET, *plan, "--steps", "3", "--run-dir", str(tmp_path / "parts"), "--checkpoint-every", "3")
    resumed = command("train", TARGET, *plan, "--steps", "6", "--run-dir", str(tmp_path / "parts"), "--resume")

    assert resumed["resumed_from"] == 3
    assert resumed["loss"] == whole["loss"]
    assert whole["loss"] < whole["first_loss"]
