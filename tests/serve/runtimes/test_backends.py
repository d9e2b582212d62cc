"""Each runtime on a small model: equal to eager, at sizes that were not exported."""

from __future__ import annotations

import ast
import json

import pytest
import torch
from small_models import Mlp

import plait
import plait.serve
from plait.errors import ServeError

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def model() -> Mlp:
    torch.manual_seed(3)
    made = Mlp(64).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def exported(tmp_path, backend: str, precision: str = "fp32", **options):
    report = plait.export(
        model(), backend, inputs=X, precision=precision, output=tmp_path, batch=5, threads=1, seconds=0, **options
    )
    return report["rows"][0]


@pytest.mark.parametrize("backend", ["executorch", pytest.param("aoti", marks=pytest.mark.slow)])
def test_fp32_is_equal(tmp_path, backend):
    """One artefact serves batch 1, 2, 5 and what lies between."""
    row = exported(tmp_path, backend)
    assert row["status"] == "ok", row
    served = plait.serve.load(tmp_path / backend, threads=1)

    assert [one["sizes"]["batch"] for one in row["parity"]] == [2, 1, 5]
    with torch.no_grad():
        for count in (1, 3, 5):
            assert torch.allclose(served(X[:count]), model()(X[:count]), atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "precision", "cosine"),
    [
        ("torch", "bf16", 0.999),
        ("openvino", "bf16", 0.999),
        ("onnxruntime", "fp16", 0.999),
        ("openvino", "fp16", 0.999),
        ("executorch", "fp16", 0.999),
        ("executorch", "int8", 0.999),
        ("onnxruntime", "int8", 0.999),
        ("onnxruntime", "int8-weight", 0.999),
        ("openvino", "int8-weight", 0.999),
    ],
)
def test_lower_precisions_are_near(tmp_path, backend, precision, cosine):
    """Not equal, and near enough; what is written loads without the export."""
    row = exported(tmp_path, backend, precision)
    assert row["status"] == "ok", row

    assert cosine < row["data"]["cosine"] < 1
    if row["keeps"]:
        served = plait.serve.load(tmp_path / f"{backend}-{precision}", threads=1)
        assert served(X[:1]).dtype == torch.float32
        assert torch.allclose(served(X), model()(X), atol=0.1)


def test_tensorrt_is_prepared(tmp_path):
    """Checked ONNX, samples, and a script that is Python with the limits of every input; it does not load here."""
    row = exported(tmp_path, "tensorrt")
    script = (tmp_path / "tensorrt" / "build_engine.py").read_text()
    ast.parse(script)

    assert row["status"] == "prepared"
    assert "never run here" in row["facts"]["note"]
    assert "latency" not in row
    assert json.loads(script.split("ENTRIES = ")[1].split("\nHERE")[0]) == {
        "forward": {
            "inputs": [["x", [1, 16], [2, 16], [5, 16]]],
            "samples": ["forward-0.safetensors", "forward-1.safetensors", "forward-2.safetensors"],
        }
    }
    with pytest.raises(ServeError, match="prepared only"):
        plait.serve.load(tmp_path / "tensorrt")


def test_neuron_is_refused_by_name(tmp_path):
    """With what is missing, and nothing written."""
    row = exported(tmp_path, "neuron")

    assert row["status"] == "missing"
    assert "neuronx-cc" in row["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
