"""Operators that no runtime knows, spelled in those that all know."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plait.serve.runtimes.spelled import SORTING, counts, differences, grouped_product, sorted_by_counting, spelled


@pytest.mark.parametrize("ends", [[2, 5, 9], [0, 9, 9], [3, 3, 7]], ids=["plain", "empty groups", "rows left over"])
def test_grouped_product(ends):
    """Each row times its group's matrix; rows after the last group are zero."""
    rows, weights = torch.randn(9, 4), torch.randn(3, 4, 5)
    want = torch.zeros(9, 5)
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        want[start:end] = rows[start:end] @ weights[group]

    assert torch.allclose(grouped_product(rows, weights, torch.tensor(ends)), want, atol=1e-6)


def test_counts_are_histc():
    """With values at the limits and outside of them, and of whole numbers in bins of their own."""
    x = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 4.0, -1.0, 5.0])
    assert torch.equal(counts(x, 4, 0, 4), torch.histc(x, 4, 0, 4))
    experts = torch.randint(4, (50,)).float()
    assert torch.equal(counts(experts, 4, 0, 3), torch.histc(experts, 4, 0, 3))


def test_differences_are_diff():
    """Of any order and dimension, with something before and after, of numbers and of bools."""
    x = torch.randn(3, 6)
    assert torch.equal(differences(x, 2, 1), torch.diff(x, 2, 1))
    assert torch.equal(differences(x, 1, 0, x[:1], x[:1]), torch.diff(x, 1, 0, x[:1], x[:1]))
    assert torch.equal(differences(x > 0), torch.diff(x > 0))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([3, 1, 3, 0, 1, 3]),
        torch.tensor([[0.5, float("nan"), -1.0], [float("inf"), 0.5, 0.5]]),
        torch.randn(3, 4, 5),
        torch.tensor([True, False, True]),
    ],
    ids=["whole numbers", "nan", "three dims", "bools"],
)
def test_sorted_by_counting_is_sort(x, descending):
    """Values and indices of the stable sort, along every dimension."""
    for dim in range(-x.dim(), x.dim()):
        want = torch.sort(x, dim=dim, descending=descending, stable=True)
        values, indices = sorted_by_counting(x, dim, descending)
        assert torch.equal(indices, want.indices)
        assert torch.equal(values.nan_to_num() if x.is_floating_point() else values, want.values.nan_to_num())


def test_sorting_leaves_the_graph_when_asked():
    """For a runtime without it alone; open sizes stay open."""

    class Sorts(nn.Module):
        def forward(self, x):
            return x[torch.argsort(x)], torch.sort(x, descending=True)[0]

    x = torch.randint(9, (6,))
    before = torch.export.export(Sorts(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO(max=8)},), strict=False)
    after = spelled(before, SORTING)

    assert any("sort" in str(node.target) for node in spelled(before).graph.nodes)
    assert not any("sort" in str(node.target) for node in after.graph.nodes)
    x = torch.randint(9, (8,))
    for got, want in zip(after.module(check_guards=False)(x), Sorts()(x), strict=True):
        assert torch.equal(got, want)


def test_a_program_keeps_its_results_open_sizes_and_lines():
    """The operators are gone; batch stays open; an operator still knows the user's line."""

    class Uses(nn.Module):
        def forward(self, x):
            return torch.diff(x, dim=-1).transpose(0, 1).relu()

    x = torch.randn(4, 6)
    shapes = ({0: torch.export.Dim.AUTO(max=8)},)
    before = torch.export.export(Uses(), (x,), dynamic_shapes=shapes, strict=False)
    after = spelled(before)

    assert not any("diff" in str(node.target) for node in after.graph.nodes)
    for count in (2, 8):
        rows = torch.randn(count, 6)
        assert torch.equal(after.module(check_guards=False)(rows), Uses()(rows))
    relu = next(node for node in after.graph.nodes if "relu" in str(node.target))
    assert "return torch.diff(x, dim=-1)" in relu.meta["stack_trace"]
