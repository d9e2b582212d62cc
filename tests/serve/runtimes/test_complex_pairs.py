"""Complex numbers as pairs of real ones: the same values, and no complex tensor left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plait.serve.runtimes.casting import open_dims
from plait.serve.runtimes.complex_pairs import in_pairs


class Turned(nn.Module):
    """Pairs of features turned by tables, joined, moved about, scaled and read again."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(32.0), torch.tensor([1.0, 0.3, 0.1]))
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[batch, length, 6] -> three tensors."""
        z = torch.view_as_complex(self.linear(x).unflatten(-1, (3, 2)))
        z = z * self.table[: x.shape[1]].unsqueeze(0)
        w = torch.cat([z, z.conj()], -1).transpose(-1, -2) * 0.5
        w = w - torch.complex(x[..., :1].transpose(1, 2), x[..., 1:2].transpose(1, 2)) * w
        return (
            torch.view_as_real(w.permute(0, 2, 1)).flatten(-2),
            (w / 2).abs(),
            z[:, -1].real + z[..., 0].imag.sum(1)[:, None],
        )


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_the_same_values_at_every_size():
    """The sizes that were open stay so, and inputs keep their names."""
    torch.manual_seed(0)
    model = Turned().eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (torch.randn(2, 5, 6),), dynamic_shapes=({0: auto, 1: auto},), strict=False)
    pairs = in_pairs(program)
    kinds = {value.dtype for node in pairs.graph.nodes if isinstance(value := node.meta.get("val"), torch.Tensor)}

    assert kinds == {torch.float32}
    assert pairs.graph_signature.user_inputs == program.graph_signature.user_inputs
    assert [set(dims) for dims in open_dims(pairs)] == [{0, 1}]
    for sizes in ((2, 5), (3, 1), (1, 31)):
        x = torch.randn(*sizes, 6)
        for got, want in zip(pairs.module()(x), model(x), strict=True):
            assert torch.allclose(got, want, atol=1e-6)


class Spectrum(nn.Module):
    """A transform, which pairs have no form of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, m] -> [n, m // 2 + 1]."""
        return torch.fft.rfft(x).abs()


class Out(nn.Module):
    """Complex results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n] -> [n]."""
        return torch.polar(x, x)


@pytest.mark.parametrize(("module", "sizes"), [(Spectrum(), (2, 8)), (Out(), (3,)), (nn.Linear(3, 3), (2, 3))])
def test_what_stays_as_it_is(module: nn.Module, sizes: tuple[int, ...]):
    """An operator that is not there, complex outputs, no complex numbers at all."""
    program = torch.export.export(module, (torch.randn(*sizes),), strict=False)

    assert in_pairs(program) is program
