"""Where an export writes."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from plait.errors import ServeError
from plait.serve.manifest import FORMAT, MANIFEST
from plait.serve.output_folder import check_output, finished_folder, write_whole


def fill(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT}))
    (folder / "file").write_text(text)


def test_a_folder_is_finished_or_not_there(tmp_path):
    """The final name appears at the end alone; a failure leaves what was there before."""
    final = tmp_path / "out"
    with finished_folder(final) as aside:
        fill(aside, "first")
        assert not final.exists()

    def fails() -> None:
        with finished_folder(final) as aside:
            fill(aside, "half")
            raise OSError(28, "full")

    with pytest.raises(OSError, match="full"):
        fails()

    assert (final / "file").read_text() == "first"
    with finished_folder(final) as aside:
        fill(aside, "second")
    assert (final / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_whoever_finishes_last_of_two_stays(tmp_path, monkeypatch):
    """Two exports take one name as often as they like; neither fails, and nothing else is left."""
    final = tmp_path / "out"
    problems = []
    process = threading.local()
    monkeypatch.setattr(os, "getpid", lambda: process.number)

    def export(number: int) -> None:
        process.number = number
        try:
            for _ in range(40):
                with finished_folder(final) as aside:
                    fill(aside, str(number))
        except OSError as problem:
            problems.append(problem)

    threads = [threading.Thread(target=export, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not problems
    assert (final / "file").read_text() in ("1", "2", "3")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "what", ["file", "link to nothing", "a file above it", "folder", "name", "report", "start file"]
)
def test_what_is_in_the_way_is_not_replaced(tmp_path, what):
    """Files and folders that no export has written are the user's."""
    out = tmp_path / "out"
    names = {
        "file": "out",
        "a file above it": "out",
        "folder": "out/torch/notes.txt",
        "name": "out/torch",
        "report": "out/report.json",
        "start file": "out/serve.sh",
    }
    if what == "link to nothing":
        out.symlink_to(tmp_path / "absent")
    else:
        path = tmp_path / names[what]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    with pytest.raises(ServeError, match=r"in the way|cannot be a folder"):
        check_output(out / "deeper" if what == "a file above it" else out, ["torch"])


def test_what_an_export_wrote_is_replaced(tmp_path):
    """Artefacts, reports, empty folders; other things beside them do not matter."""
    (tmp_path / "aoti").mkdir()
    (tmp_path / "torch").mkdir()
    fill(tmp_path / "torch", "old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.json").write_text(json.dumps({"plait": "1", "rows": [], "weights_sha256": "0"}))

    check_output(tmp_path, ["torch", "aoti", "openvino"])
    check_output(tmp_path / "not" / "yet", ["torch"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    """It is said before anything is made."""
    tmp_path.chmod(0o500)
    with pytest.raises(ServeError, match="nothing can be written into"):
        check_output(tmp_path / "out", ["torch"])
    tmp_path.chmod(0o700)


def test_a_file_is_whole_or_not_there(tmp_path):
    """What was there stays where it cannot be written."""
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "a.json", "{}")
    write_whole(tmp_path / "b.json", "{}")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
