"""Artefacts of anybody: checked before they are used, made whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from plait.errors import ServeError
from plait.serve.manifest import MANIFEST, Manifest
from plait.serve.served import Function, load
from plait.serve.subject import Entry, TensorSpec


def artefact(folder: Path) -> Path:
    folder.mkdir()
    (folder / "forward.pt2").write_bytes(b"weights")
    entry = Entry(
        inputs=(TensorSpec("x", "float32", ("batch", 3)),),
        outputs=(TensorSpec("output", "float32", ("batch", 2)),),
        dims={"batch": (1, 8)},
    )
    manifest = Manifest(
        backend="torch",
        precision="fp32",
        entries={"forward": entry},
        source="test",
        weights_sha256="0",
        plait="0",
        versions={},
    )
    manifest.write(folder)
    return folder


def changed(folder: Path, change) -> Path:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))
    return folder


def test_it_comes_back(tmp_path):
    """What was written is what is read."""
    folder = artefact(tmp_path / "a")
    manifest = Manifest.read(folder)

    assert manifest.entries["forward"].dims == {"batch": (1, 8)}
    assert manifest.files["forward.pt2"][0] == 7


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret", "..\\secret"])
def test_files_outside_of_the_folder_are_refused(tmp_path, name):
    """A manifest cannot point at other files of this computer."""
    (tmp_path / "secret").write_text("s")
    folder = changed(artefact(tmp_path / "a"), lambda data: data["files"].update({name: [1, "0"]}))

    with pytest.raises(ServeError, match="outside of the folder; refused"):
        load(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    """Nor by a symbolic link under a plain name."""
    folder = artefact(tmp_path / "a")
    (tmp_path / "secret").write_bytes(b"weights")
    (folder / "forward.pt2").unlink()
    (folder / "forward.pt2").symlink_to(tmp_path / "secret")

    with pytest.raises(ServeError, match=r"outside of the folder|no plain file"):
        load(folder)


def test_a_changed_or_truncated_file_is_refused(tmp_path):
    """Size and hash are the export's."""
    folder = artefact(tmp_path / "a")
    (folder / "forward.pt2").write_bytes(b"WEIGHTS")

    with pytest.raises(ServeError, match="truncated or was changed"):
        load(folder)


def test_a_file_that_came_later_is_refused(tmp_path):
    """A folder holds what its manifest says and nothing else."""
    folder = artefact(tmp_path / "a")
    (folder / "extra.bin").write_bytes(b"x")

    with pytest.raises(ServeError, match=r"extra.bin is not in manifest.json"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format="other"),
        lambda data: data.pop("entries"),
        lambda data: data.update(entries={}),
        lambda data: data.update(files=[1]),
        lambda data: data.update(backend=7),
        lambda data: data["entries"]["forward"].update(inputs=[{"name": "x", "dtype": "float32", "shape": [-1]}]),
        lambda data: data["entries"]["forward"].update(outputs=[{"name": "x", "dtype": "float99", "shape": [1]}]),
        lambda data: data.update(precision="fp7"),
        lambda data: data["entries"].update({"../x": data["entries"]["forward"]}),
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path, change):
    """In one line, without a traceback."""
    folder = changed(artefact(tmp_path / "a"), change)

    with pytest.raises(ServeError, match="malformed"):
        load(folder)


def test_no_artefact_and_unknown_backend(tmp_path):
    """A folder that is none says so; a backend that is not installed is named."""
    with pytest.raises(ServeError, match=r"there is no manifest.json"):
        load(tmp_path)
    folder = changed(artefact(tmp_path / "a"), lambda data: data.update(backend="elsewhere"))
    with pytest.raises(ServeError, match="'elsewhere' is not installed"):
        load(folder)


def test_what_a_runtime_cannot_read_is_said(tmp_path):
    """A file that fits its hash and is still no program: the runtime's error is the cause of plait's."""
    with pytest.raises(ServeError, match=r"a: torch cannot load forward: \w+: "):
        load(artefact(tmp_path / "a"), threads=1)(torch.zeros(2, 3))


def test_a_runtime_that_fails_or_gives_too_little(tmp_path):
    """In a line, too."""
    entry = Entry(inputs=(TensorSpec("x", "float32", (3,)),), outputs=(TensorSpec("y", "float32", (3,)),))

    def fails(inputs):
        raise RuntimeError("no such kernel")

    with pytest.raises(ServeError, match="here: forward failed when it ran: RuntimeError: no such kernel"):
        Function(entry, fails, "here")(torch.zeros(3))
    with pytest.raises(ServeError, match="0 outputs, 1 are in its manifest"):
        Function(entry, lambda inputs: [], "here")(torch.zeros(3))
