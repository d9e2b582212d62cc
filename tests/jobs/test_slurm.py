"""Slurm's files, run: a fake sbatch and srun give the environment of two tasks, the training is real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.cli.main import run

# As Slurm does: reads the options, copies the script elsewhere, runs the copy from where sbatch was called.
SBATCH = """\
#!/bin/sh
grep '^#SBATCH' "$1" > options.txt
cp "$1" spool.sh
SLURM_JOB_ID=4242 SLURM_JOB_NODELIST='node[1-2]' SLURM_NNODES=2 bash spool.sh
"""
# One task in each node, ended together when one fails.
SRUN = """\
#!/bin/bash
while [ "${1#-}" != "$1" ]; do shift; done
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & done
status=0
for node in 0 1; do wait -n || { status=$?; kill $(jobs -p) 2>/dev/null; }; done
exit $status
"""
SCONTROL = "#!/bin/sh\nprintf '127.0.0.1\\n127.0.0.1\\n'\n"


@pytest.fixture
def slurm(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch, srun and scontrol on PATH."""
    folder = project / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return project


@pytest.mark.multi
@pytest.mark.slow
def test_two_tasks_train(slurm: Path):
    """sbatch's copy of the script finds its folder, srun's two tasks find each other and train."""
    words = (
        "launch tiny.py:job --plan dp=2 --to slurm --nodes 2 --gpu-type cpu --steps 2 --restarts 0 --run-dir runs/it"
    )
    assert run(words.split()) == 0
    done = subprocess.run(
        ["sbatch", "launch/tiny-slurm/job.sbatch"], capture_output=True, text=True, timeout=300, check=False
    )

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    log = [json.loads(line) for line in Path("runs/it/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in log] == [1, 2]
    assert sorted(path.name for path in Path("runs/it/checkpoints").iterdir())


def test_options(slurm: Path):
    """One task a node, all its devices, back into the queue after a failure."""
    assert run(["launch", "tiny.py:job", "--plan", "dp=4,tp=4", "--to", "slurm", "--gpu-type", "H100"]) == 0
    text = Path("launch/tiny-slurm/job.sbatch").read_text(encoding="utf-8")
    options = [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith("#SBATCH ")]

    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--requeue"} <= set(options)
    # Options count only where they stand above the first command.
    first = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert all(i < first for i, line in enumerate(text.splitlines()) if line.startswith("#SBATCH"))
