"""torchrun's script in one node, run for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.cli.main import run


@pytest.mark.multi
@pytest.mark.slow
def test_a_process_that_dies_is_started_again(fragile: Path, capfd, monkeypatch):
    """--submit starts the script; after the failure all processes start anew and go on from the newest checkpoint."""
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = "launch fragile.py:job --plan dp=2 --to torchrun --gpu-type cpu --steps 4 --run-dir runs/it --restarts 1"

    assert run([*words.split(), "--checkpoint-minutes", "0", "--submit", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["submitted"]
    assert Path("died").exists(), err[-3000:]
    assert "nothing to resume from" in err
    log = [json.loads(line)["step"] for line in Path("runs/it/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(set(log)) == [1, 2, 3, 4], err[-3000:]
    assert log.count(1) == 1, "the second start began at step 1 again"


@pytest.mark.multi
@pytest.mark.slow
def test_from_anywhere(project: Path):
    """The script finds the project by its own place; a plan beyond SPEC comes from its plan.yaml."""
    Path("cut.yaml").write_text("pp: 2\ncuts: [1]\nmicrobatches: 2\n", encoding="utf-8")
    assert run("launch tiny.py:job --plan cut.yaml --to torchrun --gpu-type cpu --steps 1 --restarts 0".split()) == 0  # noqa: SIM905
    done = subprocess.run(
        ["bash", project / "launch" / "tiny-torchrun" / "node.sh"],
        cwd="/", env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
    assert (project / "runs" / "tiny" / "log.jsonl").is_file()
