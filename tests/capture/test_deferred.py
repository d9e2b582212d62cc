"""Deferred construction gives the very values of plain construction, and never holds the model."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations

from plait.capture.deferred import Deferred, DeferredError, build_deferred

THRESHOLD = 256


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones under every name."""
    found = dict(module.named_parameters(remove_duplicate=False))
    return {**found, **dict(module.named_buffers(remove_duplicate=False))}


def check_equal(build: Callable[[], nn.Module], *, fakes: int = 1) -> Deferred:
    """Bit for bit what plain construction gives, the generator's last state included, with some tensors deferred."""
    torch.manual_seed(3)
    whole = tensors_of(build())
    end = torch.get_rng_state()
    torch.manual_seed(99)
    deferred = build_deferred(build, 3, threshold=THRESHOLD)
    mine = tensors_of(deferred.module)

    assert torch.equal(torch.get_rng_state(), end)
    assert list(mine) == list(whole)
    for name, tensor in mine.items():
        real = deferred.materialise(tensor)
        assert torch.equal(real, whole[name]), name
        assert (real.dtype, real.stride()) == (whole[name].dtype, whole[name].stride()), name
        assert isinstance(tensor, nn.Parameter) == isinstance(whole[name], nn.Parameter), name
        assert tensor.requires_grad == whole[name].requires_grad, name
        assert deferred.is_deferred(tensor) == isinstance(tensor, FakeTensor), name
    assert sum(isinstance(tensor, FakeTensor) for tensor in mine.values()) >= fakes
    assert torch.equal(torch.get_rng_state(), end)
    return deferred


class Module(nn.Module):
    """A module whose constructor is a function."""

    def __init__(self, fill: Callable[[Any], None]) -> None:
        super().__init__()
        fill(self)


def everything(m: Any) -> None:
    """The initialisations that constructors are seen to use."""
    m.embedding = nn.Embedding(100, 32, padding_idx=3)
    m.positions = nn.Parameter(torch.randn(1, 64, 32) * 0.02)
    m.orthogonal = nn.Parameter(nn.init.orthogonal_(torch.empty(64, 32)))
    m.truncated = nn.Parameter(nn.init.trunc_normal_(torch.empty(64, 32), std=0.02))
    m.far_tail = nn.Parameter(nn.init.trunc_normal_(torch.empty(64, 32), std=1.0, a=1.0, b=3.0))
    m.sparse = nn.Parameter(nn.init.sparse_(torch.empty(64, 32), 0.1))
    m.causal = nn.Buffer(torch.tril(torch.ones(40, 40)).view(1, 1, 40, 40))
    angles = torch.outer(torch.arange(64.0), 1 / 10000 ** (torch.arange(0, 16) / 16))
    m.register_buffer("rotary", torch.polar(torch.ones(64, 16), angles), persistent=False)
    m.lstm = nn.LSTM(32, 32, 2)
    m.weight_norm = parametrizations.weight_norm(nn.Linear(32, 32))
    m.spectral_norm = parametrizations.spectral_norm(nn.Linear(32, 32))
    m.rotation = parametrizations.orthogonal(nn.Linear(32, 32))
    m.rates = nn.Buffer(torch.tensor(torch.linspace(0, 0.1, 500).tolist()))
    m.array = nn.Parameter(torch.from_numpy(np.linspace(0, 1, 2048).reshape(64, 32)).float())
    weight = torch.empty(64, 32)
    weight.data.uniform_(-1, 1)
    m.uniform = nn.Parameter(weight)
    m.transposed = nn.Parameter(m.uniform.detach().clone().t())
    m.transposed.data[0].copy_(m.positions[0, 0, :].repeat(2))
    m.transposed.data = m.transposed.data * 2
    m.copies = nn.ModuleList(copy.deepcopy(nn.Conv2d(8, 16, 3)) for _ in range(2))
    nn.init.dirac_(m.copies[0].weight)
    m.converted = nn.Linear(32, 32).to(torch.bfloat16)
    nn.init.uniform_(m.uniform[3:5])
    m.permutation = nn.Buffer(torch.randperm(1000))
    m.mask = nn.Buffer(torch.bernoulli(torch.full((64, 32), 0.3)))
    m.small = nn.Parameter(torch.zeros(32))
    m.small.data[:] = m.positions[0, 1]
    own = torch.Generator().manual_seed(5)
    m.first_own = nn.Parameter(torch.randn(40, 40, generator=own))
    m.second_own = nn.Parameter(torch.empty(40, 40).normal_(generator=own))
    m.skipped = nn.utils.skip_init(nn.Linear, 32, 32)
    nn.init.xavier_normal_(m.skipped.weight)
    nn.init.zeros_(m.skipped.bias)


def test_common_initialisations_are_exact() -> None:
    """Whatever a constructor does, the values are those it gives by itself."""
    check_equal(lambda: Module(everything), fakes=25)


def test_layers_copied_by_deepcopy_are_exact() -> None:
    """nn.Transformer clones one layer and initialises the clones again."""
    check_equal(lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True), fakes=16)


def test_values_that_python_asks_for_are_there() -> None:
    """Branches, loops of rejections and numpy see the real numbers."""

    def fill(m: Any) -> None:
        m.weight = nn.Parameter(torch.randn(64, 32))
        if m.weight.mean() > 0:
            m.positive = nn.Parameter(torch.rand(3))
        while bool((m.weight.abs() > 2.5).any()):
            m.weight.data = torch.where(m.weight.data.abs() > 2.5, torch.randn(64, 32), m.weight.data)
        m.total = nn.Buffer(torch.tensor(float(m.weight.detach().numpy().sum())))
        m.where = nn.Buffer(torch.nonzero(m.weight > 2))
        m.last = nn.Parameter(torch.rand(64, 32))

    check_equal(lambda: Module(fill), fakes=2)


def test_a_trial_forward_in_the_constructor_is_exact() -> None:
    """Constructors run their trunk once to learn a size; running statistics and dropout masks follow."""

    def fill(m: Any) -> None:
        m.trunk = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        width = m.trunk(torch.randn(2, 3, 8, 8)).shape[1]
        m.head = nn.Linear(width, 10)

    check_equal(lambda: Module(fill), fakes=2)


def test_another_default_dtype_is_kept() -> None:
    """A constructor under torch.set_default_dtype gives that dtype when materialised later, under another."""

    def build() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return nn.Sequential(nn.Linear(32, 32), Module(lambda m: m.register_buffer("b", torch.arange(600) / 7)))
        finally:
            torch.set_default_dtype(before)

    check_equal(build, fakes=2)


def test_tied_parameters_have_one_storage_key() -> None:
    """Ties are known by storage, and a later write to one is seen by both."""

    def fill(m: Any) -> None:
        m.table = nn.Embedding(100, 32)
        m.head = nn.Linear(32, 100, bias=False)
        m.head.weight = m.table.weight
        m.view = nn.Parameter(m.table.weight.detach()[:50])
        nn.init.normal_(m.head.weight, std=0.01)

    deferred = check_equal(lambda: Module(fill), fakes=3)
    keys = {deferred.storage_key(tensor) for tensor in tensors_of(deferred.module).values()}

    assert len(keys) == 1


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HUGGING_FACE: list[tuple[str, str, dict[str, Any]]] = [
    ("GPT2LMHeadModel", "GPT2Config", {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    ("LlamaForCausalLM", "LlamaConfig", TEXT),
    ("BertForMaskedLM", "BertConfig", TEXT),
    ("T5ForConditionalGeneration", "T5Config", {**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}),
    ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_key_value_heads": 4, "num_local_experts": 4}),
    ("ViTForImageClassification", "ViTConfig", {**SIZES, "image_size": 32, "patch_size": 8}),
    (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **TEXT,
            "conv_dim": (16, 16),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
    ),
]


@pytest.mark.parametrize(("model", "config", "options"), HUGGING_FACE, ids=[case[0] for case in HUGGING_FACE])
def test_hugging_face_models_are_exact(model: str, config: str, options: dict[str, Any]) -> None:
    """Their constructors initialise twice, copy, tie and pad."""
    transformers = pytest.importorskip("transformers")

    check_equal(lambda: getattr(transformers, model)(getattr(transformers, config)(**options)), fakes=8)


def test_conversion_in_the_constructor_is_exact() -> None:
    """A model that is built in fp32 and converted has the rounded values, in bf16."""
    deferred = check_equal(lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64)).to(torch.bfloat16), fakes=2)

    assert {parameter.dtype for parameter in deferred.module.parameters()} == {torch.bfloat16}


def test_a_failing_constructor_leaves_the_generator() -> None:
    """The caller builds whole instead, from the same random state."""

    def build() -> nn.Module:
        nn.Linear(64, 64)
        raise ValueError("no such width")

    before = torch.get_rng_state()
    with pytest.raises(DeferredError, match="ValueError: no such width"):
        build_deferred(build, 5, threshold=THRESHOLD)

    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_deferred_is_refused() -> None:
    """The address of memory that is not there, and a write through numpy, are not made up."""
    with pytest.raises(DeferredError, match="data_ptr"):
        build_deferred(lambda: Module(lambda m: print(torch.zeros(64, 64).data_ptr())), 0, threshold=THRESHOLD)
    with pytest.raises(DeferredError, match="read-only"):
        build_deferred(lambda: Module(lambda m: torch.zeros(64, 64).numpy().fill(1.0)), 0, threshold=THRESHOLD)


def test_a_large_argument_that_changes_is_noticed() -> None:
    """Large real tensors are kept by reference; using one after it was changed would give other values."""
    given = torch.ones(64, 64)
    deferred = build_deferred(
        lambda: Module(lambda m: m.register_buffer("b", torch.zeros(64, 64).copy_(given))), 0, threshold=THRESHOLD
    )
    before = deferred.materialise(deferred.module.b)  # type: ignore[arg-type]
    given.add_(1)

    assert torch.equal(before, torch.ones(64, 64))
    with pytest.raises(DeferredError, match="was changed"):
        deferred.materialise(deferred.module.b)  # type: ignore[arg-type]


def test_tensors_from_elsewhere_are_refused() -> None:
    """A fake tensor of another mode has no values here."""
    deferred = build_deferred(lambda: nn.Linear(64, 64), 0, threshold=THRESHOLD)
    with FakeTensorMode():
        stranger = torch.empty(64, 64)

    with pytest.raises(DeferredError, match="not made by this build"):
        deferred.materialise(stranger)


def test_shapes_alone_draw_nothing_large() -> None:
    """Without following the generator random values are refused, others are there."""

    def fill(m: Any) -> None:
        m.weight = nn.Parameter(torch.randn(64, 64))
        m.mask = nn.Buffer(torch.tril(torch.ones(64, 64)))

    deferred = build_deferred(lambda: Module(fill), 0, advance=False, threshold=THRESHOLD)

    assert torch.equal(deferred.materialise(deferred.module.mask), torch.tril(torch.ones(64, 64)))  # type: ignore[arg-type]
    with pytest.raises(DeferredError, match="advance=True"):
        deferred.materialise(deferred.module.weight)  # type: ignore[arg-type]


MEMORY = """
import resource, torch
from torch import nn
from plait.capture.deferred import build_deferred
torch.set_num_threads(1)
class Stack(nn.Sequential):
    def __init__(self, layers):
        super().__init__(*(nn.Linear(1024, 4096) for _ in range(layers)))
        for layer in self:
            nn.init.normal_(layer.weight, std=0.02)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(layers):
    deferred = build_deferred(lambda: Stack(layers), 0)
    for parameter in deferred.module.parameters():
        deferred.materialise(parameter)
run(1)
before = peak()
run(25)
print(peak() - before)
"""


def test_memory_stays_far_below_the_model() -> None:
    """A model of 420 MB is built, and its parameters materialised one at a time, in less than 100 MB more than one layer takes."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120, check=True)

    assert float(done.stdout) < 100
