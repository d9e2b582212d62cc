"""A decoder's artefact holds its weights once; a file of weights that is not the programs' is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from plait.errors import ServeError
from plait.serve.backend import Artefact, Backend
from plait.serve.decoding.decode import add_decoder
from plait.serve.decoding.generation import generation
from plait.serve.prepare import prepare
from plait.serve.runtimes.onnx_file import check_onnx
from plait.serve.runtimes.onnxruntime import OnnxRuntime
from plait.serve.runtimes.openvino import OpenVino
from plait.serve.runtimes.torch_program import TorchProgram
from plait.serve.source import eval_mode, source_of
from plait.serve.subject import Subject


class Tied(nn.Module):
    """Attention; the head shares the embedding's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.qkv, self.head = nn.Embedding(200, 64), nn.Linear(64, 192), nn.Linear(64, 200, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, 200]."""
        x = self.token(tokens)
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """With forward, prefill and decode."""
    torch.manual_seed(0)
    model = Tied()
    source = source_of(model, inputs=torch.zeros(2, 8, dtype=torch.int64))
    folder = tmp_path_factory.mktemp("subject")
    found = prepare(source, folder, asked=(1,), data=[], tell=lambda _: None).subject
    with eval_mode(model):
        inputs = source.serving_job.batch[0]
        return add_decoder(found, model, inputs, capacity=16, most=2, random=False)[0]


@pytest.mark.parametrize(
    ("backend", "file"),
    [(TorchProgram(), "model.safetensors"), (OnnxRuntime(), "weights.data"), (OpenVino(), "weights.bin")],
    ids=lambda value: getattr(value, "name", ""),
)
def test_weights_are_written_once(backend: Backend, file: str, subject: Subject, tmp_path: Path) -> None:
    """One file has the weights; every entry point gives eager's outputs, and greedily the same tokens."""
    if backend.missing():
        pytest.skip(backend.missing())
    facts = backend.export(subject, tmp_path, "fp32")
    nbytes = subject.parameter_bytes

    # The head is written turned where a runtime multiplies so, hence twice the tied weight at most.
    assert nbytes <= (tmp_path / file).stat().st_size < 2 * nbytes
    assert sum(1 for path in tmp_path.iterdir() if path.suffix in (".bin", ".data", ".safetensors")) == 1
    for name, entry in subject.entries.items():
        run = backend.load(Artefact(folder=tmp_path, entry=entry, precision="fp32", threads=1, facts=facts))
        for sample in entry.samples:
            for got, expected in zip(run(subject.inputs(sample, name)), subject.outputs(sample, name), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    made = generation(backend, subject, tmp_path, facts, "fp32", 1, timed=False)

    assert made["tokens"] == 16 + 1 - made["prompt"]
    assert made["equal"]


def test_other_weights_are_refused(subject: Subject, tmp_path: Path) -> None:
    """Of another shape, or not there."""
    backend, path = TorchProgram(), tmp_path / "model.safetensors"
    backend.export(subject, tmp_path, "fp32")
    artefact = Artefact(folder=tmp_path, entry=subject.entries["decode"], precision="fp32", threads=1, facts={})
    weights = load_file(path)
    save_file({**weights, "qkv.weight": torch.zeros(3, 64)}, path)
    with pytest.raises(ServeError, match=r"qkv.weight is torch.float32 \[3, 64\], the program takes"):
        backend.load(artefact)
    path.write_bytes(b"nothing")
    with pytest.raises(ServeError, match="the program's weights are not in it"):
        backend.load(artefact)
    path.unlink()
    with pytest.raises(ServeError, match="the program's weights are not in it"):
        backend.load(artefact)


def test_cut_off_data_is_refused(subject: Subject, tmp_path: Path) -> None:
    """A model whose weights would lie behind the end of their file."""
    pytest.importorskip("onnxscript")
    OnnxRuntime().export(subject, tmp_path, "fp32")
    data = tmp_path / "weights.data"
    data.write_bytes(data.read_bytes()[:5000])

    with pytest.raises(ServeError, match=r"would lie behind the end of 'weights.data'"):
        check_onnx(tmp_path / "decode.onnx")
