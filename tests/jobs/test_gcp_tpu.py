"""queue.sh, run against a gcloud that writes down what it was asked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from plait.cli.main import run

# Knows no request until one is made; it waits twice and is active then.
GCLOUD = """\
#!/bin/sh
echo "$*" >> asked.txt
case "$*" in
    *describe*--format*)
        count=$(grep -c 'describe.*--format' asked.txt)
        [ "$count" -lt 3 ] && echo WAITING_FOR_RESOURCES || echo ACTIVE ;;
    *describe*) grep -q 'queued-resources create' asked.txt ;;
esac
"""


@pytest.fixture
def gcloud(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """gcloud, and a sleep that does not."""
    folder = project / "bin"
    folder.mkdir()
    for name, text in (("gcloud", GCLOUD), ("sleep", "#!/bin/sh\n")):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return project


def start(**more: str) -> subprocess.CompletedProcess[str]:
    words = "launch tiny.py:job --to gcp-tpu --gpu-type TPU-v5p --plan fsdp=8 --devices-per-node 4 --spot"
    assert run(words.split()) == 0
    return subprocess.run(
        ["bash", "launch/tiny-gcp-tpu/queue.sh"],
        env={**os.environ, **more}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_asks_waits_sends_starts(gcloud: Path):
    """In this order; the type counts TensorCores, the runtime is the part's own."""
    done = start(ZONE="us-east5-a")
    asked = Path("asked.txt").read_text(encoding="utf-8").splitlines()

    assert done.returncode == 0, done.stderr
    create = next(line for line in asked if "queued-resources create" in line)
    assert "--accelerator-type v5p-16 --runtime-version v2-alpha-tpuv5 --spot" in create
    assert sum("--format" in line for line in asked) == 3
    assert "tpu-vm scp --recurse" in "\n".join(asked)
    assert asked[-1].endswith("--command bash ~/job/node.sh")


def test_the_zone_is_asked_for(gcloud: Path):
    """Before anything is asked of gcloud."""
    done = start()

    assert done.returncode != 0
    assert "set it to a zone that has v5p-16" in done.stderr
    assert not Path("asked.txt").exists()
