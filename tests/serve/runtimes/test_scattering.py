"""Writing to places that values decide, spelled as a search of each place for its writer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plait.serve.runtimes.scattering import put, without_scattering


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 2)])
@pytest.mark.parametrize("count", [4, 1])
def test_it_writes_as_torch_does(shape: tuple[int, ...], count: int):
    """Places counted from either end, values spread over them."""
    x, places = torch.randn(shape), torch.tensor([0, -1, 3, 5])
    values = torch.randn(count, *shape[1:])

    assert torch.equal(put(x, [places], values), torch.index_put(x, (places,), values))
    assert torch.equal(put(x, [places], torch.tensor(2.0)), torch.index_put(x, (places,), torch.tensor(2.0)))


def test_what_it_leaves_to_torch():
    """Truth values, several dimensions, sums."""
    x, rows, columns = torch.randn(5, 4), torch.tensor([1, 1]), torch.tensor([0, 3])
    ones = torch.ones(2)

    assert torch.equal(put(x, [rows, columns], ones), torch.index_put(x, (rows, columns), ones))
    assert torch.equal(put(x, [rows], ones[:, None], True), torch.index_put(x, (rows,), ones[:, None], True))
    assert torch.equal(put(x, [x[:, 0] > 0], ones[0]), torch.index_put(x, (x[:, 0] > 0,), ones[0]))


class Inverse(nn.Module):
    """Sorts, turns the order around by writing it, and reads a view of what it wrote into."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] -> ([n], [n])."""
        order = torch.argsort(x, stable=True)
        whole = torch.zeros(2, x.shape[0], dtype=torch.int64)
        part = whole[1]
        part[order] = torch.arange(x.shape[0])
        return x[order][part], whole[1] + whole[0]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, of its copy of a program
def test_a_program_without_it():
    """What reads the same memory through another view reads what was written."""
    x = torch.tensor([0.3, 2.0, -1.0, 0.5])
    program = without_scattering(torch.export.export(Inverse(), (x,), strict=False))
    names = {str(node.target) for node in program.graph.nodes}

    assert not {name for name in names if "index_put" in name}
    for got, want in zip(program.module()(x), Inverse()(x), strict=True):
        assert torch.equal(got, want)
