"""--to huggingface: a folder that from_pretrained loads, exact, from a run under any plan; other models are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plait.serve.prepare import prepare
from plait.serve.runtimes.huggingface import HuggingFace
from plait.serve.source import source_of
from plait.serve.subject import Subject

transformers = pytest.importorskip("transformers")

GPT2 = "hf:gpt2?n_layer=2&n_embd=32&n_head=2&vocab_size=256&n_positions=32&seq_len=8"


def _subject(what: Any, folder: Path, **options: Any) -> Subject:
    folder.mkdir(parents=True, exist_ok=True)
    return prepare(source_of(what, **options), folder, asked=(1, 2), data=[], tell=lambda _: None).subject


@pytest.mark.multi
def test_a_run_under_a_plan_is_loaded_by_from_pretrained(tmp_path: Path) -> None:
    """Trained under tp and pp with tied weights: names, values, outputs and the config's own cache setting."""
    from plait.run.checkpoint import iterate_whole, latest
    from plait.run.launch import run_train

    run_train(target=GPT2, devices=4, plan="tp=2,pp=2", steps=2, batch=4, run_dir=tmp_path / "run", json=True)
    subject = _subject(str(tmp_path / "run"), tmp_path / "subject", target=GPT2)
    out = tmp_path / "out"
    out.mkdir()
    backend = HuggingFace()

    assert not backend.refusal(subject, "fp32")
    facts = backend.export(subject, out, "fp32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    checkpoint = latest(tmp_path / "run")
    assert checkpoint is not None
    trained = dict(iterate_whole(checkpoint))
    own = loaded.state_dict()

    assert facts["exact"] is True
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    assert all(torch.equal(own[name], value) for name, value in trained.items())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.config.use_cache is True  # as the type has it; capture had switched it off


def test_large_weights_are_sharded_and_low_precisions_cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files with an index; bf16 weights where asked; tokenizer files come along."""
    subject = _subject(GPT2, tmp_path / "subject")
    (subject.folder / "huggingface" / "tokenizer.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(HuggingFace, "shard_size", 30_000)
    out = tmp_path / "out"
    out.mkdir()
    HuggingFace().export(subject, out, "bf16")

    assert (out / "model.safetensors.index.json").is_file()
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert (out / "tokenizer.json").is_file()
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


class _Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(tokens).logits  # type: ignore[no-any-return]


def test_another_model_is_refused_with_what_to_use_instead(tmp_path: Path) -> None:
    """A plain module, and one that holds a transformers model."""
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16, use_cache=False)
    around = _subject(_Around(transformers.GPT2LMHeadModel(config)), tmp_path / "a", inputs=tokens)
    plain = _subject(nn.Sequential(nn.Linear(4, 4)), tmp_path / "b", inputs=torch.zeros(2, 4))

    assert "export inner (GPT2LMHeadModel) by itself" in HuggingFace().refusal(around, "fp32")
    assert "--to torch" in HuggingFace().refusal(plain, "fp32")
