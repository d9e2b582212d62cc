"""Code blocks of README and docs are run.

Python blocks are run as they stand, one after another in one namespace per page. Console blocks
are run line by line where the fence says `console run`; others only have to name verbs and files that exist.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from plait.cli.main import run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(words after the language, text) of a page's blocks."""
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        words = match.group(1).split()
        if words[:1] == [language]:
            found.append((" ".join(words[1:]), match.group(2)))
    return found


def commands(text: str) -> list[str]:
    """What a person types: the lines after `$ `, joined where they end in a backslash."""
    joined = text.replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


PYTHON = [page for page in PAGES if any("run" in words for words, _ in blocks(page, "python"))]
RUNS = [
    (page, command)
    for page in PAGES
    for words, text in blocks(page, "console")
    if "run" in words.split()
    for command in commands(text)
]
NAMED = [
    (page, command)
    for page in PAGES
    for _, text in blocks(page, "console")
    for command in commands(text)
    if command.startswith("plait ")
]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path):
    """A page's Python blocks marked `run` run in order, in a process of their own."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(text for words, text in blocks(page, "python") if "run" in words.split()))
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("page", "command"), RUNS, ids=lambda value: getattr(value, "name", str(value))[:60])
def test_console_blocks_run(page: Path, command: str, tmp_path: Path):
    """A console line marked `run` ends with status 0."""
    words = shlex.split(command)
    assert words[0] == "plait", f"{page.name}: only plait's own commands are run, not {words[0]}"
    words = [str(tmp_path / w) if before == "--run-dir" else w for before, w in zip(["", *words], words, strict=False)]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )

    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("page", "command"), NAMED, ids=lambda value: getattr(value, "name", str(value))[:60])
def test_console_blocks_name_what_exists(page: Path, command: str, capsys: pytest.CaptureFixture[str]):
    """Every verb, option and example file that a page shows exists."""
    words = shlex.split(command, comments=True)[1:]
    assert run([words[0], "--help"]) == 0, f"{page.name}: {words[0]}"
    shown = capsys.readouterr().out
    for word in words[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in shown, f"{page.name}: {word} is no option of plait {words[0]}"
        elif word.startswith("examples/"):
            assert (ROOT / re.split(r"[:?]", word)[0]).is_file(), f"{page.name}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    """Links to files of the repository point at files that exist."""
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
