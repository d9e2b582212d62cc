"""Weights read from a folder, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.capture.deferred import build_deferred
from plait.capture.pretrained import load_mapped
from plait.capture.target import load_target

GPT2 = "hf:gpt2?n_embd=64&n_layer=2&n_head=4&vocab_size=2000"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint as transformers writes it."""
    torch.manual_seed(3)
    load_target(GPT2).model().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_tied_and_prefixed_names_are_found(folder: Path):
    """A checkpoint of the model without its head, as many hubs have them, fits too."""
    stored = load_file(folder / "model.safetensors")
    save_file({k.removeprefix("transformer."): v for k, v in stored.items()}, folder / "model.safetensors")
    model = load_target(GPT2).model()

    assert "lm_head.weight" not in stored
    assert load_mapped(model, folder)
    assert torch.equal(model.lm_head.weight, stored["transformer.wte.weight"])


def test_other_names_or_shapes_leave_the_model_alone(folder: Path, tmp_path: Path):
    """Nothing is copied where anything does not fit."""
    wider = load_target(GPT2.replace("n_embd=64", "n_embd=32")).model()
    before = {n: p.clone() for n, p in wider.state_dict().items()}

    assert not load_mapped(wider, folder)
    assert not load_mapped(wider, tmp_path / "absent")
    assert not load_mapped(torch.nn.Linear(2, 2), folder)
    assert all(torch.equal(p, before[n]) for n, p in wider.state_dict().items())


def test_a_deferred_model_reads_what_is_asked_for(folder: Path):
    """Built without memory, each tensor still has the stored values."""
    stored = load_file(folder / "model.safetensors")
    deferred = build_deferred(load_target(f"hf:{folder}").model, seed=0)
    named = dict(deferred.module.named_parameters())
    large = named["transformer.wte.weight"]

    assert deferred.is_deferred(large)
    assert all(torch.equal(deferred.materialise(named[name]), stored[name]) for name in named)
