"""Which operator stopped a runtime, and where it stands."""

from __future__ import annotations

import torch
from small_models import Mlp
from torch.nn import functional as F

from plait.serve.blame import blame, user_frame


def program() -> torch.export.ExportedProgram:
    return torch.export.export(Mlp().eval(), (torch.randn(2, 16),), strict=False)


def test_an_operators_kind_in_any_spelling():
    """Runtimes write aten::gelu, aten.gelu.default or torch.ops.aten.gelu; the user's line is the one that calls it."""
    exported = program()
    for text in (
        "No conversion rule for operations: aten::gelu",
        "torch.ops.aten.gelu.default is not supported",
        "Unsupported fx node gelu, kind gelu",
    ):
        found = blame(text, exported)
        assert found is not None
        assert found.operator == "aten.gelu.default"
        assert "return self.down(self.drop(F.gelu(self.up(x))))" in found.where
        assert "small_models.py:" in found.where


def test_a_nodes_own_name_tells_it_from_its_likes():
    """The second linear is the second line, not the first."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            return F.relu(self.b(x))

    exported = torch.export.export(Two(), (torch.randn(2, 4),), strict=False)
    found = blame("failed at node %linear_1 : aten.linear", exported)

    assert found is not None
    assert "F.relu(self.b(x))" in found.where


def test_nothing_is_blamed_without_a_name():
    """A message that names no operator of the graph blames none."""
    assert blame("out of memory", program()) is None
    assert blame("aten::fft_fft", program()) is None


def test_torchs_own_frames_are_passed_over():
    """The innermost frame outside torch is the user's."""
    stack = (
        '  File "/home/a/net.py", line 7, in forward\n    y = self.norm(x)\n'
        '  File "/usr/lib/python3/site-packages/torch/nn/modules/normalization.py", line 229, in forward\n    return F.layer_norm('
    )

    assert user_frame(stack) == "/home/a/net.py:7, in forward: y = self.norm(x)"
