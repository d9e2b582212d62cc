"""torchrun over several nodes, for real: two network namespaces joined by a wire, each one a node."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from plait.cli.main import run

PLAN = "dp=2,pp=2"
STEPS = 4


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Names of two namespaces whose only network is eth0, 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (Debian: apt-get install iproute2)")
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    tag = uuid.uuid4().hex[:6]
    names = (f"plait{tag}a", f"plait{tag}b")
    wires = (f"w{tag}a", f"w{tag}b")
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as problem:
        pytest.skip(f"network namespaces cannot be made here: {problem.stderr.strip()}")
    try:
        ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        for number, (name, wire) in enumerate(zip(names, wires, strict=True), 1):
            ip("link", "set", wire, "netns", name)
            ip("-n", name, "link", "set", wire, "name", "eth0")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            left = subprocess.run(
                ["ip", "netns", "pids", name], check=False, capture_output=True, text=True, timeout=20
            )
            for pid in left.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)


def losses(folder: Path) -> dict[int, float]:
    """By step; of a step that was done twice, the last."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each printed; all are ended if one takes too long."""
    try:
        return [process.communicate(timeout=210)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait(10)


def sent_bytes(name: str) -> int:
    """What a node sent over the wire."""
    shown = subprocess.run(
        ["ip", "-n", name, "-j", "-s", "link", "show", "eth0"], check=True, capture_output=True, text=True, timeout=20
    )
    return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"])


@pytest.mark.multi
@pytest.mark.slow
def test_two_nodes_train_as_one(fragile: Path, nodes: tuple[str, str]):
    """The very files that `plait launch` wrote, started once in each node: the losses of one node, over the wire.

    A process of the second node dies before its third step. Both nodes start theirs again, meet again, and go on.
    """
    one = [
        sys.executable,
        "-m",
        "plait",
        "train",
        "tiny.py:job",
        "--plan",
        PLAN,
        "--devices",
        "4",
        "--steps",
        str(STEPS),
    ]
    quick = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*one, "--run-dir", "runs/one"], check=True, capture_output=True, timeout=150, env=quick)
    words = (
        "launch fragile.py:job --to torchrun --nodes 2 --gpu-type cpu --interface eth0 --run-dir runs/two --restarts 1 "
        f"--checkpoint-minutes 0 --plan {PLAN} --steps {STEPS}"
    )
    assert run(words.split()) == 0
    place = {**quick, "PLAIT_TIMEOUT_S": "60", "MASTER_ADDR": "10.77.0.1", "PYTHON": sys.executable}
    outputs = finish(
        [
            subprocess.Popen(
                ["timeout", "-k", "10", "200", "ip", "netns", "exec", name, "bash", "launch/fragile-torchrun/node.sh"],
                env={**place, "NODE_RANK": str(number)},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for number, name in enumerate(nodes)
        ]
    )  # fmt: skip
    shown = "\n".join(output[-3000:] for output in outputs)

    assert list(losses(Path("runs/one"))) == [1, 2, 3, 4]
    assert Path("died").exists(), shown
    assert losses(Path("runs/two")) == pytest.approx(losses(Path("runs/one")), abs=1e-6), shown
    # Every microbatch crossed from the first stage, which is one node, to the second, and its gradient came back.
    assert min(sent_bytes(name) for name in nodes) > STEPS * 16 * 8 * 4
