"""The pages of docs/coming-in whose commands need an environment of their own: each is typed as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from plait.environments.make import find
from plait.environments.names import wanted
from plait.errors import RequestError

PAGES = Path(__file__).parents[2] / "docs" / "coming-in"


def commands(page: str) -> list[list[str]]:
    """The page's own command lines that convert a model."""
    text = (PAGES / page).read_text(encoding="utf-8")
    found = re.findall(r"^\$ python (-m plait\.incoming .*)$", text, re.MULTILINE)
    assert found, page
    return [shlex.split(line) for line in found]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "environment"), [("tensorflow.md", "tensorflow"), ("retired.md", "mxnet")])
def test_the_commands_of_a_page(tmp_path: Path, page: str, environment: str):
    """What the page says to type writes the ONNX file."""
    try:
        python = find(environment)
    except RequestError as missing:
        pytest.skip(f"{missing.message}: {missing.hint}")
    script = Path(__file__).parent / f"make_{environment}.py"
    variables = {**os.environ, **dict(wanted(environment).variables)}
    subprocess.run([python, "-I", script, tmp_path], check=True, capture_output=True, timeout=240, env=variables)
    for words in commands(page):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.onnx").is_file()
