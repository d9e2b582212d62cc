"""Operators that a runtime lacks, spelled in others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from plait.serve.runtimes import lacking
from plait.serve.runtimes.lacking import converted


@pytest.mark.parametrize("size", [(1, 2, 3), (4, 6, 5), (3, None, 2)])
def test_adaptive_averages(size):
    """Windows that overlap where the sizes do not divide; None keeps a size."""
    x = torch.randn(2, 3, 4, 6, 7)

    assert torch.allclose(lacking.adaptive_average(x, size), F.adaptive_avg_pool3d(x, size), atol=1e-6)
    assert torch.allclose(
        lacking.adaptive_average(x[:, :, 0], size[1:]), F.adaptive_avg_pool2d(x[:, :, 0], size[1:]), atol=1e-6
    )


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "dilation": (1, 2, 1)}, {"padding": (2, 0, 1)}])
def test_volumes(options):
    """Convolution with groups, and the largest of windows, by pictures."""
    x, weight, bias = torch.randn(2, 4, 7, 8, 9), torch.randn(6, 2, 3, 2, 3), torch.randn(6)
    want = F.conv3d(x, weight, bias, groups=2, **options)
    assert torch.allclose(lacking.volumes_convolved(x, weight, bias, groups=2, **options), want, atol=1e-5)

    if options.get("padding") != (2, 0, 1):  # a pool pads by half of its window at most
        want = F.max_pool3d(x, 3, **options)
        assert torch.equal(lacking.largest_of_volumes(x, 3, **options), want)
    assert torch.equal(lacking.largest_of_volumes(x, (1, 2, 2)), F.max_pool3d(x, (1, 2, 2)))


def test_small_ones():
    """Windows, rows added, distances and limits, along every dimension."""
    x = torch.randn(3, 8, 5)
    assert torch.equal(lacking.windows(x, 1, 3, 2), x.unfold(1, 3, 2))
    index, source = torch.tensor([4, 0, 4]), torch.randn(3, 8, 3)
    want = x.index_add(2, index, source, alpha=2)
    assert torch.allclose(lacking.indices_added(x, 2, index, source, alpha=2), want, atol=1e-6)
    for p in (0.0, 1.0, 2.0, 3.0, float("inf")):
        assert torch.allclose(lacking.distances(x, x[:, :2] + 1, p), torch.cdist(x, x[:, :2] + 1, p), atol=1e-5)
    assert torch.equal(lacking.limited(x, 0, 0.5), x.clamp(0, 0.5))
    assert torch.equal(lacking.limited(torch.tensor([-3, 9]), None, 4), torch.tensor([-3, 4]))
    ties = torch.tensor([[1.0, 3.0, 1.0, 3.0]])
    for descending in (False, True):
        want = torch.sort(ties, dim=1, descending=descending)
        assert torch.equal(lacking.sorted_stably(ties, dim=1, descending=descending)[0], want.values)


def test_numbers_in_order():
    """Running products, the middle one, whole parts, and which bucket, with values at its limits."""
    x = torch.tensor([[1.5, -2.0, 0.0, 3.25], [-0.5, 4.0, 2.0, 1.0]])
    assert torch.allclose(lacking.products(x, 1), x.cumprod(1))
    assert torch.allclose(lacking.products(x, 0), x.cumprod(0))
    for keepdim in (True, False):
        assert torch.equal(lacking.middle(x, 1, keepdim)[0], x.median(1, keepdim).values)
        assert torch.equal(lacking.middle(x, 1, keepdim)[1], x.median(1, keepdim).indices)
    assert torch.equal(lacking.towards_zero(x), x.trunc())
    assert torch.equal(lacking.fraction(x), x.frac())
    assert torch.allclose(lacking.rest(x, 0.75), x.fmod(0.75))
    assert torch.equal(lacking.rest(torch.tensor([-7, 7]), -3), torch.tensor([-7, 7]).fmod(-3))
    limits = torch.tensor([-0.5, 1.0, 2.0])
    for right in (True, False):
        assert torch.equal(lacking.buckets(x, limits, right=right), torch.bucketize(x, limits, right=right))


class Patches(nn.Module):
    """`unfold` and `index_add_`, which is written in place."""

    def forward(self, x):
        y = x.unfold(1, 3, 2).sum(-1)
        return torch.zeros_like(x).index_add_(1, torch.tensor([0, 4]), y[:, :2])


def test_what_a_runtime_names_is_spelled_and_tried_again():
    """As often as it names something new; the result is the same function."""
    x = torch.randn(2, 8)
    asked = []

    def convert(program):
        kinds = [str(n.target) for n in program.graph.nodes]
        asked.append(kinds)
        for kind in ("aten.unfold.default", "aten.index_add.default"):
            if kind in kinds or kind.replace(".default", "_.default") in kinds:
                raise RuntimeError(f"no kernel for {kind.split('.')[1]} of aten::{kind.split('.')[1]}.out")
        return program

    program = converted(convert, torch.export.export(Patches(), (x,), strict=False))

    assert len(asked) == 3
    assert torch.allclose(program.module()(x), Patches()(x))


def test_what_cannot_be_spelled_is_the_error():
    """The one that is left, not the ones that were got rid of before; what names nothing is not tried again."""
    program = torch.export.export(Patches(), (torch.randn(2, 8),), strict=False)

    def refuses(program):
        if any("unfold" in str(n.target) for n in program.graph.nodes):
            raise RuntimeError("no aten::unfold")
        raise RuntimeError("no aten::zeros_like")

    with pytest.raises(RuntimeError, match="no aten::zeros_like"):
        converted(refuses, program)

    def crashes(program):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        converted(crashes, program)
