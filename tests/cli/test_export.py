"""`plait export`: what is typed, what is printed, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plait.cli.main import run
from plait.serve.table import exit_status

ROW = {"backend": "onnxruntime", "precision": "fp32", "status": "ok"}


@pytest.fixture
def asked(monkeypatch):
    """What the verb hands to `plait.export`, which gives a report of one row."""
    found = {}

    def fake(what, to, **options):
        found.update(what=what, to=to, **options)
        options["tell"]("onnxruntime", "exporting")
        return {
            "model": "m",
            "weights": "given",
            "parameter_bytes": 2**20,
            "entries": {},
            "rows": [found.get("row", ROW)],
            "best": [],
        }

    monkeypatch.setattr("plait.serve.export.export", fake)
    return found


def test_it_hands_on_what_was_typed(asked, capsys):
    """Each option under its own name."""
    words = "export a.py:job --to onnxruntime,torch --precision fp32,int8 --batch 1,4 --threads 2 --seconds 1 --limit 9 -o out"
    assert run(words.split()) == 0

    assert (asked["what"], asked["to"], asked["precision"]) == ("a.py:job", "onnxruntime,torch", "fp32,int8")
    assert (asked["batch"], asked["threads"], asked["seconds"], asked["limit"]) == ((1, 4), (2,), 1, 9)
    assert str(asked["output"]) == "out"
    captured = capsys.readouterr()
    assert "onnxruntime: exporting" in captured.err
    assert "onnxruntime" in captured.out


def test_json_is_one_object(asked, capsys):
    """Nothing else on stdout, nothing on stderr."""
    assert run(["export", "a.py:job", "--to", "onnxruntime", "--json"]) == 0
    captured = capsys.readouterr()

    assert json.loads(captured.out)["rows"] == [ROW]
    assert captured.err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "a.py:job"], "Missing option '--to'"),
        (["export", "--to", "torch"], "Missing argument"),
        (["export", "a.py:job", "--to", "torch", "--batch", "one"], "not a list of whole numbers"),
        (["export", "a.py:job", "--to", "tensorflow"], "no backend 'tensorflow'"),
        (["export", "a.py:job", "--to", "torch", "--precision", "fp23"], "no precision 'fp23'; did you mean 'fp32'"),
        (["export", "absent.py:job", "--to", "torch"], "absent.py: no such file"),
        (["export", "absent", "--to", "torch"], "no such run directory, and no target"),
    ],
)
def test_a_mistake_is_status_2(words, message, capsys):
    """One clear message on stderr."""
    assert run(words) == 2
    err = capsys.readouterr().err

    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("states", "asked_for", "status"),
    [
        (["ok", "prepared"], "all", 0),
        (["ok", "missing"], "all", 0),
        (["ok", "missing"], "b0,b1", 2),
        (["ok", "failed", "missing"], "all", 1),
        (["missing", "refused"], "all", 2),
    ],
)
def test_exit_status(states, asked_for, status):
    """0 done; 1 a backend failed; 2 one that was asked for by name cannot be had."""
    rows = [{"backend": f"b{i}", "status": state} for i, state in enumerate(states)]

    assert exit_status({"rows": rows}, asked_for) == status


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_terminated_export_ends_the_runtime_that_works(tmp_path):
    """Nothing goes on by itself, and no folder is left half-written."""
    command = [sys.executable, "-m", "plait", "export", "examples/gpt.py:job?layers=1&width=32", "--to", "torch"]
    with subprocess.Popen(
        [*command, "--output", str(tmp_path / "out"), "--seconds", "60"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert any("torch: timing" in line for line in process.stderr), "it never came to its timing"
        assert _mentioning(tmp_path)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    until = time.monotonic() + 30
    while _mentioning(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _mentioning(tmp_path)
    assert not (tmp_path / "out" / "torch").exists()


def _mentioning(folder: Path) -> list[str]:
    """Children of exports that write into the folder: their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            words = entry.read_bytes().decode(errors="replace")
            if "plait.serve.child" in words and str(folder) in words:
                found.append(words)
    return found
