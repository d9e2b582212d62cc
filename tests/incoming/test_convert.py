"""TensorFlow and MXNet models by way of ONNX, converted in environments of their own where those are made."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("onnx")
import torch
from proving import verdicts

import plait
from plait.environments.make import find
from plait.environments.names import wanted
from plait.errors import PlaitError, RequestError, TargetError
from plait.incoming.__main__ import main
from plait.incoming.convert import from_mxnet, from_tensorflow

if TYPE_CHECKING:
    from plait.run.processes import Workers

HERE = Path(__file__).parent


def made_in(environment: str, folder: Path) -> Path:
    """The folder that make_ENVIRONMENT.py fills; skips with the command where there is no such environment."""
    try:
        python = find(environment)
    except RequestError as missing:
        pytest.skip(f"{missing.message}: {missing.hint}")
    script = HERE / f"make_{environment}.py"
    variables = {**os.environ, **dict(wanted(environment).variables)}
    subprocess.run([python, "-I", script, folder], check=True, capture_output=True, timeout=240, env=variables)
    return folder


@pytest.fixture(scope="module")
def tensorflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in("tensorflow", tmp_path_factory.mktemp("tensorflow"))


@pytest.fixture(scope="module")
def mxnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in("mxnet", tmp_path_factory.mktemp("mxnet"))


def apart(onnx: Path, x: np.ndarray, y: np.ndarray) -> float:
    """Largest difference of the imported module's output, relative to the largest output."""
    with torch.no_grad():
        got = plait.from_onnx(onnx).eval()(torch.from_numpy(x)).numpy()
    return float(np.abs(got - y).max() / np.abs(y).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saved", "old.h5", "model.tflite", "frozen.pb"])
def test_tensorflow(tensorflow: Path, tmp_path: Path, workers: Workers, name: str):
    """A SavedModel, an old Keras file, TFLite, a frozen graph of TensorFlow 1: equal to TensorFlow within 1e-5, then trained on two replicas."""
    path = tmp_path / "model.onnx"
    assert main(["tensorflow", str(tensorflow / name), "-o", str(path)]) == 0

    expected = np.load(tensorflow / "expected.npz")
    assert apart(path, expected["x"], expected["y"]) <= 1e-5
    if name == "saved":
        assert workers.call(verdicts, f"onnx:{path}", ("dp=2",))[0]["dp=2"].ok


@pytest.mark.slow
def test_a_signature_that_is_not_there(tensorflow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What TensorFlow says reaches the user in one line, status 1, and no file is left."""
    arguments = ["tensorflow", str(tensorflow / "plain"), "--signature", "none", "-o", str(tmp_path / "m.onnx")]
    assert main(arguments) == 1

    told = capsys.readouterr().err
    assert "no signature 'none'; it has serving_default" in told
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_mxnet(mxnet: Path, tmp_path: Path, workers: Workers):
    """A Gluon CNN with an open batch: its opset put right, its statistics buffers, equal to MXNet, trained on replicas."""
    path = tmp_path / "model.onnx"
    reply = from_mxnet(
        mxnet / "net-symbol.json", mxnet / "net-0000.params", path, shapes=[(4, 3, 10, 10)], dynamic=True
    )
    expected = np.load(mxnet / "expected.npz")
    module = plait.from_onnx(path)

    assert reply["inputs"] == ["data"]
    assert module.opset == 13
    assert len(list(module.parameters())) == 8
    assert len(list(module.buffers())) == 2
    assert apart(path, expected["x"], expected["y"]) <= 1e-5
    assert workers.call(verdicts, f"onnx:{path}", ("dp=2",))[0]["dp=2"].ok


def test_what_cannot_be_converted(tmp_path: Path):
    """No such file, a folder that is no SavedModel, an output folder that is not there."""
    (tmp_path / "empty").mkdir()
    for path, words in [("none", "no such file"), ("empty", "neither a SavedModel")]:
        with pytest.raises(TargetError, match=words):
            from_tensorflow(tmp_path / path, tmp_path / "m.onnx")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(TargetError, match=r"x\.params: no such file"):
        from_mxnet(tmp_path / "x.json", tmp_path / "x.params", tmp_path / "m.onnx", shapes=[(1, 2)])
    with pytest.raises(TargetError, match="its folder is not there"):
        from_tensorflow(saved(tmp_path), tmp_path / "none" / "m.onnx")


def saved(folder: Path) -> Path:
    """Something that looks like a SavedModel from outside."""
    (folder / "saved").mkdir()
    (folder / "saved" / "saved_model.pb").write_bytes(b"nothing of the kind")
    return folder / "saved"


def test_without_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Status 2, and the command that makes it."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    assert main(["tensorflow", str(saved(tmp_path)), "-o", str(tmp_path / "m.onnx")]) == 2

    assert "hint: python -m plait.environments make tensorflow" in capsys.readouterr().err


@pytest.mark.slow
def test_a_broken_saved_model(tensorflow: Path, tmp_path: Path):
    """TensorFlow's own word on it."""
    with pytest.raises(PlaitError, match="from_tensorflow: "):
        from_tensorflow(saved(tmp_path), tmp_path / "m.onnx")
