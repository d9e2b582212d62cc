"""torchrun over several nodes, for real: two and three network namespaces on a switch, each one a node."""

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
from plait.schema import Plan

STEPS = 4


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Names of namespaces whose only network is eth0, 10.77.0.1 and on; their wires meet in a bridge in one more."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (Debian: apt-get install iproute2)")
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    tag = uuid.uuid4().hex[:6]
    switch, *names = all_names = [f"plait{tag}{number}" for number in range(request.param + 1)]
    try:
        for name in all_names:
            ip("netns", "add", name)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
    except subprocess.CalledProcessError as problem:
        remove(all_names)
        pytest.skip(f"network namespaces cannot be made here: {problem.stderr.strip()}")
    try:
        ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names, 1):
            ip("-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        remove(all_names)


def remove(names: list[str]) -> None:
    """The namespaces, and what still runs in them."""
    for name in names:
        left = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True, timeout=20)
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
@pytest.mark.parametrize(("nodes", "plan"), [(2, "dp=2,pp=2"), (3, "pp=3,microbatches=4")], indirect=["nodes"])
def test_several_nodes_train_as_one(fragile: Path, nodes: list[str], plan: str):
    """The very files that `plait launch` wrote, started once in each node: the losses of one node, over the wire.

    A process of the last node dies before its third step. All nodes start theirs again, meet again, and go on.
    """
    devices = str(Plan.parse(plan).devices)
    one = [
        sys.executable, "-m", "plait", "train", "tiny.py:job", "--plan", plan, "--devices", devices, "--steps", str(STEPS),
    ]  # fmt: skip
    quick = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*one, "--run-dir", "runs/one"], check=True, capture_output=True, timeout=150, env=quick)
    words = (
        "launch fragile.py:job --to torchrun --gpu-type cpu --interface eth0 --run-dir runs/several --restarts 1 "
        f"--checkpoint-minutes 0 --plan {plan} --steps {STEPS} --nodes {len(nodes)}"
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
    assert losses(Path("runs/several")) == pytest.approx(losses(Path("runs/one")), abs=1e-6), shown
    # Every microbatch crossed from a stage on one node to the next, and its gradient came back.
    assert min(sent_bytes(name) for name in nodes) > STEPS * 16 * 8 * 4
