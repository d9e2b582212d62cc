"""Capture: the model's own names, its ties, its cuts, and what stops it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import plait
from plait.capture.trace import trace
from plait.errors import CaptureError, TargetError


class Tied(nn.Module):
    """A table used at both ends, and layers between."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(layers)
        )
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return {"logits": self.head(x)}


class Branching(nn.Module):
    """Python that depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y if y.sum() > 0 else -y


def _loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten())


def _job(model: object = Tied, **options: object) -> plait.Job:
    tokens = torch.randint(11, (6, 5))
    return plait.Job(model, loss=_loss, batch=(tokens, tokens), **options)  # type: ignore[arg-type]


def test_ties_are_one_parameter_under_the_first_name() -> None:
    """The head knows the table's weight by another name."""
    program = trace(_job())
    graph = program.graph
    assert graph is not None

    names = [spec.name for spec in graph.parameters]
    assert names.count("table.weight") == 1
    assert "head.weight" not in names
    assert graph.parameter("head.weight").aliases == ("head.weight",)
    assert graph.numel == sum(p.numel() for p in Tied().parameters())


def test_layers_are_equal_segments() -> None:
    """What repeats in the model is found to repeat, and one tensor crosses between."""
    graph = trace(_job(lambda: Tied(12))).graph
    assert graph is not None

    layers = [s for s in graph.segments if s.name.startswith("layers.")]
    assert len(layers) == 12
    assert len({s.equals for s in layers[1:]}) == 1
    assert all(len(s.live_in) == 1 for s in layers)


def test_flops_are_counted_by_hand() -> None:
    """Two products a layer and the head: multiply and add, six by five tokens."""
    graph = trace(_job()).graph
    assert graph is not None

    forward = 2 * 30 * (4 * 2 * 8 * 32 + 8 * 11)
    assert graph.flops == forward
    assert sum(s.backward_flops for s in graph.segments) == 2 * forward


def test_the_graph_survives_json() -> None:
    """Records are equal after a round trip."""
    graph = trace(_job()).graph
    assert graph is not None

    assert plait.Graph.from_json(graph.to_json()) == graph


def test_the_line_that_stops_a_capture_is_named() -> None:
    """With the user's own code, and what to change."""
    job = plait.Job(Branching(), loss=lambda o, t: o.mean(), batch=(torch.randn(4, 4), torch.zeros(4)))

    with pytest.raises(CaptureError, match=r"test_trace.py.*if y.sum\(\) > 0") as caught:
        trace(job)
    assert "torch.where" in caught.value.hint


def test_a_loss_that_is_no_scalar() -> None:
    """Says what it got."""
    job = plait.Job(nn.Linear(4, 4), batch=(torch.randn(4, 4), None))

    with pytest.raises(TargetError, match="the loss must be a scalar tensor, got a tensor of 2 dims"):
        trace(job)


def test_a_model_without_parameters() -> None:
    """There is nothing to train."""
    job = plait.Job(nn.ReLU(), loss=lambda o, t: o.mean(), batch=(torch.randn(4, 4), None))

    with pytest.raises(TargetError, match="the model has no parameters"):
        trace(job)


def test_a_capture_has_a_time_limit() -> None:
    """It is stopped, and says that dp and fsdp need none."""
    with pytest.raises(CaptureError, match="took longer than 0 s") as caught:
        trace(_job(), time_limit=0.01)
    assert "dp or fsdp" in caught.value.hint


def test_what_the_loss_does_not_depend_on_is_known() -> None:
    """Such a parameter never gets a gradient, as on one device."""
    model = Tied()
    model.aside = nn.Linear(8, 8)  # type: ignore[assignment]
    model.forward = lambda tokens: {  # type: ignore[method-assign]
        "logits": model.head(model.table(tokens)) + 0 * model.aside(model.table(tokens)).detach().sum()
    }
    program = trace(_job(model))

    reached = {p.name: p.reached for p in program.placeholders.values() if p.kind == "parameter"}
    assert reached["table.weight"]
    assert not reached["aside.weight"]
