"""ONNX files that torch.onnx.export wrote: equal forward, then trained under plans."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
import torch  # noqa: E402
from proving import verdicts  # noqa: E402
from torch import nn  # noqa: E402

from plait.capture.target import load_target  # noqa: E402

if TYPE_CHECKING:
    from plait.run.processes import Workers


class Series(nn.Module):
    """A recurrent layer between a table and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 12)
        self.layer = nn.LSTM(12, 16, batch_first=True)
        self.head = nn.Linear(16, 30)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.table(ids))[0])


def llama() -> nn.Module:
    """Rotary positions, grouped keys, a causal mask."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.LlamaForCausalLM(config)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    return Logits()


def convolutional() -> nn.Module:
    """A residual block; its batch norms are folded into the convolutions by the exporter."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.a(x))
            return self.head((x + torch.relu(self.norm(self.b(x)))).mean((2, 3)))

    return Block()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "llama": (llama, lambda: torch.randint(50, (4, 10))),
    "lstm": (Series, lambda: torch.randint(30, (4, 9))),
    "cnn": (convolutional, lambda: torch.randn(4, 3, 8, 8)),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a model's ONNX file, once."""
    folder = tmp_path_factory.mktemp("onnx")

    def write(name: str) -> Path:
        path = folder / f"{name}.onnx"
        if not path.exists():
            torch.manual_seed(0)
            make, batch = MODELS[name]
            module = make().eval()
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                for value in module.state_dict().values():
                    if value.is_floating_point():
                        value.add_(0.02 * torch.rand(value.shape))
                shapes = ({0: torch.export.Dim.DYNAMIC},)
                program = torch.onnx.export(module, (batch(),), dynamo=True, dynamic_shapes=shapes, verbose=False)
            program.save(path)
        return path

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_forward_is_onnxruntimes(exported: Callable[[str], Path], name: str):
    """Within 1e-5 of the largest output."""
    path = exported(name)
    job = load_target(f"onnx:{path}")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: job.batch[0].numpy()})
    with torch.no_grad():
        got = job.model.eval()(job.batch[0]).numpy()

    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plans"),
    [("llama", ("dp=2", "pp=2,microbatches=2", "tp=2")), ("lstm", ("pp=2,microbatches=2",)), ("cnn", ("dp=2",))],
)
def test_plans_compute_the_same(exported: Callable[[str], Path], workers: Workers, name: str, plans: tuple[str, ...]):
    """`verify` holds for the imported module, captured, cut and sharded like any other."""
    for plan, verdict in workers.call(verdicts, f"onnx:{exported(name)}", plans)[0].items():
        assert verdict.ok, (plan, verdict)
        assert verdict.captured


def test_arguments_of_the_target(exported: Callable[[str], Path]):
    """Samples, loss and rate; what the file does not have is refused with what it has."""
    from plait.errors import TargetError

    path = exported("cnn")
    job = load_target(f"onnx:{path}?samples=6&loss=mse&lr=0.5&fixed=head*")
    assert job.batch[0].shape == (6, 3, 8, 8)
    assert job.loss.kind == "mse"
    assert not any("head" in name for name, _ in job.model.named_parameters())
    assert job.optimizer(list(job.model.named_parameters())).param_groups[0]["lr"] == 0.5
    for wrong, words in [
        ("smples=6", "no argument 'smples'; did you mean 'samples'"),
        ("loss=mae", "loss=mae is unknown"),
    ]:
        with pytest.raises(TargetError, match=words):
            load_target(f"onnx:{path}?{wrong}")
