"""Environments of their own: made whole or not at all, and scripts run in them."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from plait.environments import make as making
from plait.environments import names
from plait.environments.__main__ import main
from plait.environments.run import run_in
from plait.errors import PlaitError, RequestError, WorkerError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pip without an index to ask."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path


@pytest.fixture
def made(cache: Path) -> names.Environment:
    """An environment that looks made; its interpreter is this one."""
    environment = names.wanted("tvm")
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    record = {"python": "3.11.7", "date": "2026-01-01", "size_gib": 0.01, "versions": {"apache-tvm": "0.1"}}
    (environment.folder / "environment.json").write_text(json.dumps(record))
    return environment


def test_what_is_not_made_names_the_command(cache: Path):
    """A missing environment is answered with what makes it."""
    with pytest.raises(RequestError, match="environment litert is not there") as caught:
        making.find("litert")

    assert caught.value.hint == "python -m plait.environments make litert"


def test_an_unknown_one_is_refused(cache: Path):
    """The names there are, in the hint."""
    with pytest.raises(RequestError, match="'lightrt'") as caught:
        making.find("lightrt")

    assert "litert" in caught.value.hint


@pytest.mark.slow
def test_without_an_index_nothing_is_left(cache: Path, capsys: pytest.CaptureFixture[str]):
    """pip that finds no package: a short message, status 1, and no folder under any name."""
    assert main(["make", "mxnet"]) == 1

    told = capsys.readouterr().err
    assert "environment mxnet: pip could not install it; nothing was kept" in told
    assert "No matching distribution" in told
    assert "Traceback" not in told
    assert list(names.root().iterdir()) == []


def test_half_made_ones_do_not_count(cache: Path):
    """Neither a folder without its record nor one under a passing name is found."""
    environment = names.wanted("tvm")
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)

    with pytest.raises(RequestError):
        making.find("tvm")


def test_what_a_killed_maker_left_is_swept(cache: Path):
    """A half-made folder goes once its process is gone, and stays while it lives."""
    environment = names.wanted("mxnet")
    dead = names.root() / f".{environment.folder.name}.{2**22 + 1}"
    alive = names.root() / f".{environment.folder.name}.{os.getppid()}"
    dead.mkdir(parents=True), alive.mkdir()
    making._sweep(environment)

    assert not dead.exists()
    assert alive.exists()


def test_the_wrong_python_is_refused(cache: Path, tmp_path: Path):
    """A version that the packages are not published for, and something that is no Python."""
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho 3 6\n")
    old.chmod(0o755)
    with pytest.raises(RequestError, match=r"published for Python 3\.10 to 3\.13, this is 3\.6"):
        making.make("litert", python=str(old))
    with pytest.raises(RequestError, match="not a Python interpreter"):
        making.make("litert", python=str(tmp_path / "none"))


def test_torch_is_held_to_the_build_that_runs_here(monkeypatch: pytest.MonkeyPatch):
    """A CPU build here means the same CPU build there; where there is no torch, there is no constraint."""
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0+cpu")

    assert making._constraints(names.wanted("litert")) == "torch==2.13.0+cpu\n"
    assert making._constraints(names.wanted("mxnet")) == ""
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.14.0+cpu")
    assert making._constraints(names.wanted("litert")) == ""


def test_list_shows_what_is_there(made: names.Environment, capsys: pytest.CaptureFixture[str]):
    """Versions and size of what is made; what is not, by name; the same as JSON."""
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "apache-tvm 0.1" in shown
    assert "not made" in shown
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["environments"]
    assert {row["name"]: row["made"] for row in rows} == {name: name == "tvm" for name in names.NAMES}


def test_remove(made: names.Environment):
    """It is gone, and a second time there is nothing."""
    assert main(["remove", "tvm"]) == 0
    assert not made.folder.exists()
    assert not making.remove("tvm")


SCRIPT = """
import json, os, signal, sys, time
asked = json.load(open(sys.argv[1]))
if asked["do"] == "sleep":
    child = os.fork()
    if child:
        json.dump({"child": child}, open(asked["note"], "w"))
    time.sleep(60)
if asked["do"] == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if asked["do"] == "raise":
    raise ValueError("what went wrong")
if asked["do"] == "refuse":
    json.dump({"error": "no such operator", "hint": "another"}, open(sys.argv[2], "w")); sys.exit(1)
if asked["do"] == "lie":
    open(sys.argv[2], "w").write("[1, 2")
else:
    json.dump({"twice": asked["x"] * 2, "path": sys.path}, open(sys.argv[2], "w"))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "work.py"
    file.write_text(SCRIPT)
    return file


def test_a_script_replies(made: names.Environment, script: Path, monkeypatch: pytest.MonkeyPatch):
    """JSON in, JSON out; nothing of this process's path comes along."""
    monkeypatch.setenv("PYTHONPATH", "/nowhere/at/all")
    reply = run_in("tvm", script, {"do": "work", "x": 4}, time_limit=30)

    assert reply["twice"] == 8
    assert "/nowhere/at/all" not in reply["path"]


@pytest.mark.parametrize(
    ("do", "kind", "message"),
    [
        ("crash", WorkerError, "ended by signal 11"),
        ("raise", WorkerError, "ended with status 1\n\n  ValueError: what went wrong"),
        ("lie", WorkerError, "ended with status 0"),
        ("refuse", PlaitError, "work: no such operator"),
    ],
)
def test_a_script_that_fails(made: names.Environment, script: Path, do: str, kind: type[Exception], message: str):
    """A crash, an exception, a broken reply and a refusal: each an error for people, and this process lives on."""
    with pytest.raises(kind, match=message.replace("\n", r"\n")):
        run_in("tvm", script, {"do": do, "x": 1}, time_limit=30)


def test_a_script_that_hangs_is_ended(made: names.Environment, script: Path, tmp_path: Path):
    """After the limit it and the process that it started are gone."""
    note = tmp_path / "note.json"
    with pytest.raises(WorkerError, match="longer than 2 s"):
        run_in("tvm", script, {"do": "sleep", "note": str(note)}, time_limit=2)
    child = json.loads(note.read_text())["child"]
    deadline = time.monotonic() + 10
    while making._is_alive(child) and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").exists() and " Z " in Path(f"/proc/{child}/stat").read_text():
            break  # ended; whoever adopted it has yet to read its status
        time.sleep(0.05)

    assert not making._is_alive(child) or " Z " in Path(f"/proc/{child}/stat").read_text()
