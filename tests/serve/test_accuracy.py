"""Differences between outputs."""

from __future__ import annotations

import math

import pytest
import torch

from plait.serve.accuracy import difference


def test_equal_outputs():
    """No difference, cosine one, every top entry the same."""
    x = torch.randn(3, 5)
    gap = difference(["y"], [x], [x.clone()])

    assert (gap.max_abs, gap.mean_abs, gap.max_rel, gap.top1) == (0, 0, 0, 1)
    assert gap.cosine == pytest.approx(1)


def test_relative_is_largest_over_largest():
    """One wrong entry of 0.5 in an output as large as 4."""
    eager = torch.tensor([[4.0, 1.0], [0.0, 2.0]])
    other = torch.tensor([[4.0, 1.5], [0.0, 2.0]])
    gap = difference(["y"], [eager], [other])

    assert gap.max_rel == pytest.approx(0.125)
    assert gap.mean_abs == pytest.approx(0.125)


def test_the_worst_output_is_named():
    """A good first output does not hide a bad second one."""
    good, bad = torch.ones(4), torch.ones(4)
    gap = difference(["a", "b"], [good, bad], [good, bad * 1.1])

    assert gap.worst == "b"
    assert gap.max_rel == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize(
    ("eager", "other"),
    [
        (torch.ones(4), torch.ones(5)),
        (torch.ones(4), torch.tensor([1.0, math.nan, 1.0, 1.0])),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.zeros(3), torch.tensor([0.0, 0.0, 1e-9])),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, -math.inf])),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.nan])),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])),
    ],
    ids=["shape", "nan", "whole number", "zero", "sign of an infinity", "nan for an infinity", "number for nan"],
)
def test_what_can_never_be_close(eager: torch.Tensor, other: torch.Tensor):
    """Wrong shapes, lost values and wrong whole numbers are infinitely far."""
    assert difference(["y"], [eager], [other]).max_rel == math.inf


def test_infinities_of_a_mask_are_equal():
    """-inf where eager has -inf is no difference."""
    eager = torch.tensor([1.0, -math.inf])

    assert difference(["y"], [eager], [eager.clone()]).max_rel == 0


def test_complex_numbers_are_compared_by_their_parts():
    """By how much, not whether they are the same number."""
    eager = torch.tensor([4 + 0j, 1 - 2j])

    assert difference(["y"], [eager], [eager.clone()]).max_rel == 0
    assert difference(["y"], [eager], [eager + 0.5j]).max_rel == pytest.approx(0.125)
    assert difference(["y"], [eager.conj()], [eager]).max_rel == pytest.approx(1)


def test_what_no_precision_excuses_is_named():
    """Another shape and lost values are; another class of an argmax is not, and says by how much."""
    logits, classes = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    gap = difference(["logits", "class"], [logits, classes], [logits, torch.tensor([0, 1, 2, 2])])

    assert (gap.max_rel, gap.lost, gap.max_abs) == (math.inf, "", 1)
    assert gap.cosine == pytest.approx(1)
    assert difference(["y"], [logits], [logits[:2]]).lost == "its shape is [2, 3], eager's is [4, 3]"
    assert "1 of 12 values" in difference(["y"], [logits], [torch.where(logits == logits.max(), math.nan, logits)]).lost


def test_the_top_entry_is_of_the_first_output_with_rows():
    """A loss that comes first has none."""
    logits = torch.tensor([[1.0, 2.0], [4.0, 3.0]])

    assert difference(["loss", "logits"], [torch.ones(()), logits], [torch.ones(()), -logits]).top1 == 0
