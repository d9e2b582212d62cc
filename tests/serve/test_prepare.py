"""What is left open is what eager itself takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import plait
from plait.errors import CaptureError
from plait.serve.prepare import Prepared, prepare
from plait.serve.source import source_of


def prepared(module: nn.Module, inputs, folder, asked=(1, 3), **options) -> Prepared:
    job = plait.Job(module, loss=None, batch=(inputs, None), **options)
    return prepare(source_of(job), folder, asked=asked, data=[], tell=lambda stage: None)


class Halves(nn.Module):
    """Its length has to be even, which torch.export does not see."""

    def forward(self, x):
        return x.reshape(x.shape[0], -1, 2, 4).mean(2)


class Spectrum(nn.Module):
    """Its length has to fit a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(9, 1))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.scale, n=16, dim=1)


@pytest.mark.parametrize(("module", "shape"), [(Halves(), (2, 12, 4)), (Spectrum(), (2, 16, 3))])
def test_a_length_that_eager_does_not_take_is_closed(tmp_path, module, shape):
    """The batch stays open; nothing is raised."""
    entry = prepared(module, torch.randn(shape), tmp_path).subject.entries["forward"]

    assert entry.dims == {"batch": (1, 3)}
    assert entry.inputs[0].shape == ("batch", *shape[1:])
    assert [sample.sizes["batch"] for sample in entry.samples] == [2, 1, 3]


def test_a_batch_that_eager_does_not_take_is_not_served(tmp_path):
    """A model that breaks at one sample serves from two on."""

    class Two(nn.Module):
        def forward(self, x):
            torch.stack([x[0], x[-2]])
            return x * 2

    entry = prepared(Two(), torch.randn(4, 3, 5, 5), tmp_path).subject.entries["forward"]

    assert entry.dims == {"batch": (2, 3)}
    assert [sample.sizes["batch"] for sample in entry.samples] == [2, 3]


def test_the_least_length_is_the_least_that_eager_takes(tmp_path):
    """It is a sample, so that each runtime is held against eager at it."""

    class Lagged(nn.Module):
        def forward(self, x):
            return x * x[:, 1].unsqueeze(1)

    entry = prepared(Lagged(), torch.randn(2, 9, 3), tmp_path).subject.entries["forward"]
    least = entry.dims["length"][0]

    assert least == 2
    assert {"batch": 2, "length": least} in [dict(sample.sizes) for sample in entry.samples]


def test_no_batch_dimension_and_no_parameters(tmp_path):
    """The nodes and edges of one graph are served at their sizes; what is only arithmetic can be served, too."""

    class Graph(nn.Module):
        def forward(self, nodes, edges):
            return torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]])

    inputs = {"nodes": torch.randn(7, 3), "edges": torch.randint(0, 7, (2, 9))}
    found = prepared(Graph(), inputs, tmp_path, batch_dim=None).subject
    entry = found.entries["forward"]

    assert (entry.dims, found.parameter_bytes) == ({}, 0)
    assert [spec.shape for spec in entry.inputs] == [(7, 3), (2, 9)]
    assert [dict(sample.sizes) for sample in entry.samples] == [{}]
    assert source_of(plait.Job(Graph, loss=None, batch=(inputs, None), batch_dim=None)).module is not None


def test_a_model_that_does_not_run_says_where(tmp_path):
    """It is the model's mistake, not its capture's, and the user's line."""

    class Wrong(nn.Module):
        def forward(self, x):
            return x @ torch.ones(5, 5)

    with pytest.raises(CaptureError, match=r"Wrong does not run in eval mode .* RuntimeError at .*test_prepare.py:\d+"):
        prepared(Wrong(), torch.randn(2, 4), tmp_path)
