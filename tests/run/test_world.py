"""Joining: processes that are not there, or cannot meet, are told of in a line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from plait.errors import PlanError
from plait.run.world import join
from plait.schema import Plan


def test_alone_with_a_plan_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how to start the others."""
    monkeypatch.delenv("RANK", raising=False)

    with pytest.raises(PlanError, match="it needs 2 processes, this is one alone") as caught:
        join(Plan.parse("dp=2"))
    assert "plait train" in caught.value.hint


@pytest.mark.multi
def test_a_port_in_use() -> None:
    """No traceback: the address, the reason, and what to choose instead."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = subprocess.run(
            [sys.executable, "-m", "plait", "train", "examples/digits.py:job", "--plan", "dp=2", "--steps", "1"],
            env={**os.environ, **place},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    assert done.returncode == 1
    assert f"cannot meet the others at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
