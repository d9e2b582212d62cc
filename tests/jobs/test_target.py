"""Whether a target exists, without running it."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.errors import TargetError
from plait.jobs.target import check_target_exists, relative_target


@pytest.mark.parametrize("target", ["tiny.py:job", "tiny.py:job?rate=0.1", "tiny:job", "plait.cli.main:run"])
def test_found(project: Path, target: str):
    """A file, a module beside, a module inside an installed package."""
    check_target_exists(target)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tniy.py:job", "target tniy.py: no such file; did you mean 'tiny.py'?"),
        ("tiny.py:jbo", "target tiny.py: it has no function 'jbo'; did you mean 'job'?"),
        ("tiny.py", "target 'tiny.py' names no function"),
        ("nowhere.at.all:job", "target nowhere.at.all: no module of this name"),
        ("hf:lama", "target hf:lama: transformers has no model type 'lama'"),
        ("hf:.", "target hf:.: has no config.json"),
    ],
)
def test_refused(project: Path, target: str, message: str):
    """What is missing, and the nearest name."""
    with pytest.raises(TargetError) as caught:
        check_target_exists(target)

    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        "from elsewhere import job",
        "import a.b as job",
        "job = make()",
        "if True:\n    def job(): ...",
        "from x import *",
    ],
)
def test_other_ways_to_make_a_function(project: Path, text: str):
    """An import, an assignment, inside an if; a star import may bring anything."""
    Path("other.py").write_text(text, encoding="utf-8")

    check_target_exists("other.py:job")


def test_a_local_name_is_no_function_of_the_module(project: Path):
    """What a function holds is its own."""
    Path("other.py").write_text("def make():\n    job = 1\n", encoding="utf-8")

    with pytest.raises(TargetError, match="no function 'job'"):
        check_target_exists("other.py:job")


def test_a_file_that_does_not_parse(project: Path):
    """Its line."""
    Path("other.py").write_text("x = 1\ndef job(:\n", encoding="utf-8")

    with pytest.raises(TargetError, match="line 2"):
        check_target_exists("other.py:job")


def test_relative_to_the_project(project: Path):
    """An absolute path in the project is written as nodes see it; outside, only where nothing is sent along."""
    assert relative_target(f"{project}/tiny.py:job?a=b", project, must_lie_within=True) == "tiny.py:job?a=b"
    assert relative_target("hf:llama", project, must_lie_within=True) == "hf:llama"
    assert relative_target("/other/x.py:job", project, must_lie_within=False) == "/other/x.py:job"
    with pytest.raises(TargetError, match="outside the working directory"):
        relative_target("/other/x.py:job", project, must_lie_within=True)


def test_a_folder_of_weights_goes_along(project: Path):
    """hf:FOLDER is relative to the project, as a file is; outside it is refused where only the project is sent."""
    (project / "weights").mkdir()
    outside = project.parent / f"{project.name}-weights"
    outside.mkdir()

    assert relative_target(f"hf:{project}/weights?seq_len=8", project, must_lie_within=True) == "hf:weights?seq_len=8"
    assert relative_target("hf:gpt2?seq_len=8", project, must_lie_within=True) == "hf:gpt2?seq_len=8"
    assert relative_target(f"hf:{outside}", project, must_lie_within=False) == f"hf:{outside}"
    with pytest.raises(TargetError, match="outside the working directory"):
        relative_target(f"hf:{outside}", project, must_lie_within=True)
