"""Every example under the plans of its docstring, and others that it is there to show, against one device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from plait.run.launch import _verify_here
from plait.run.processes import Workers
from plait.schema import Plan

FOLDER = Path(__file__).parent.parent.parent / "examples"
LLAMA = (
    "hidden_size=32&num_hidden_layers=2&num_attention_heads=4&num_key_value_heads=2&intermediate_size=64&vocab_size=64"
)
T5 = "d_model=32&num_layers=2&num_heads=4&d_kv=8&d_ff=64&vocab_size=64"

CASES = [
    ("digits.py:job", "dp=2"),
    ("digits.py:job", "pp=2"),
    ("digits.py:job", "dp=2,pp=2"),
    ("gpt.py:job?layers=4&width=64&length=16", "dp=2,pp=2"),
    ("gpt.py:job?layers=2&width=64&length=16", "tp=2"),
    ("vit_digits.py:job?layers=2&width=32", "tp=2"),
    ("vit_digits.py:job?layers=2&width=32", "tp=2,pp=2"),
    ("resnet_digits.py:job?width=8", "dp=2"),
    ("resnet_digits.py:job?width=8", "dp=2,pp=2"),
    ("dlrm.py:job?rows=50", "tp=2"),
    ("dlrm.py:job?rows=50", "fsdp=2"),
    ("encoder_decoder.py:job?width=32", "pp=2"),
    ("encoder_decoder.py:job?width=32", "dp=2,pp=2"),
    ("unet.py:job", "dp=2"),
    ("unet.py:job", "pp=2"),
    (f"hf:llama?{LLAMA}&seq_len=16", "tp=2"),
    ("hf:gpt2?n_embd=32&n_layer=2&n_head=4&vocab_size=64&seq_len=16", "pp=2"),
    (f"hf:bert?{LLAMA.replace('&num_key_value_heads=2', '')}&seq_len=16", "fsdp=2"),
    (f"hf:t5?{T5}&seq_len=16", "dp=2,pp=2"),
]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Four processes that stay for all cases."""
    with Workers(4) as workers:
        yield workers


@pytest.mark.multi
@pytest.mark.parametrize(("target", "spec"), CASES, ids=lambda value: value.partition("?")[0])
def test_an_example_computes_what_one_device_computes(workers: Workers, target: str, spec: str):
    """Losses, gradients and parameters agree within 1e-5 over two steps."""
    where = target if target.startswith("hf:") else f"{FOLDER}/{target}"
    plan = Plan.parse(spec).bound()
    verdict = workers.call(_verify_here, where, plan, 2, 16, 0, devices=plan.devices, timeout=120)[0]

    assert verdict["ok"], verdict
    assert verdict["captured"]
