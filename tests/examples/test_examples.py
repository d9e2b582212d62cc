"""Every example loads, learns on one device, and is captured by export."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from plait.capture.target import load_target
from plait.run.data import Batches

FOLDER = Path(__file__).parent.parent.parent / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
SMALL = {"gpt": "?layers=2&width=64&length=32&warmup=5&lr=3e-3"}


def job_of(name: str):
    return load_target(f"{FOLDER / name}.py:job{SMALL.get(name, '')}")


def call(model: torch.nn.Module, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_learns(name: str):
    """Over some steps of its own data the loss falls by a tenth at least."""
    job = job_of(name)
    torch.manual_seed(0)
    model = job.model()
    optimizer = job.optimizer(list(model.named_parameters()))
    losses = []
    for batch, _ in zip(Batches(job.data, batch=32), range(80), strict=False):
        loss = job.loss(call(model, batch.inputs), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert sum(losses[-8:]) < 0.9 * sum(losses[:8]), (losses[0], losses[-1])


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_captured(name: str):
    """torch.export takes it with its sample batch as it is."""
    job = job_of(name)
    inputs = job.batch[0]
    positional = inputs if isinstance(inputs, tuple) else (inputs,)

    assert torch.export.export(job.model(), positional, strict=False)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_page_whose_docstring_is_the_command(name: str):
    """At most two pages, plain torch, and the docstring names commands that run this very file."""
    source = (FOLDER / f"{name}.py").read_text()
    doc = ast.get_docstring(ast.parse(source)) or ""
    commands = re.findall(r"plait (?:train|verify)\s+\"?examples/(\w+)\.py:job", doc)

    assert len(source.splitlines()) <= 120
    assert commands
    assert set(commands) == {name}


def test_gpt_has_about_ten_million_parameters():
    """The default GPT of `make demo`."""
    model = load_target(f"{FOLDER / 'gpt'}.py:job").model()

    assert 9e6 < sum(p.numel() for p in model.parameters()) < 12e6


def test_gpt_generates_text_beside_the_entropy():
    """What is shown after training names the entropy of the text and continues the prompt."""
    job = job_of("gpt")
    text = job.generate(job.model())

    assert re.search(r"unigram entropy of the text: 3\.\d+ nats", text)
    assert "def " in text
