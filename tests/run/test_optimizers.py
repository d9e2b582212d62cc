"""What an optimizer couples is found by trying it, whatever it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from plait.run.optimizers import check_elementwise, default_optimizer

SHAPES = {
    "embed.weight": (1000, 64),
    "layers.0.weight": (64, 48),
    "layers.0.bias": (64,),
    "conv.weight": (8, 4, 3, 3),
    "scale": (),
}
MATRICES = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}


class TrustRatio(torch.optim.Optimizer):
    """LAMB's idea: the step is as long as the parameter."""

    def __init__(self, parameters: Any, *, everything: bool) -> None:
        super().__init__(parameters, {})
        self.everything = everything

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        mine = [p for group in self.param_groups for p in group["params"]]
        total = torch.stack([p.grad.norm() for p in mine]).norm()
        for p in mine:
            p.sub_(p.grad * (0.01 * p.norm() / (total if self.everything else p.grad.norm())))


def by_name(pairs: list[tuple[str, Any]]) -> torch.optim.Optimizer:
    """Groups by name, as users make them; the rate starts at zero for a warm-up."""
    decayed = [pair for pair in pairs if pair[0].endswith("weight")]
    others = [pair for pair in pairs if not pair[0].endswith("weight")]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.0)


ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    "AdamW": default_optimizer,
    "groups": by_name,
    "SGD": lambda pairs: torch.optim.SGD(pairs, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "tiny rate": lambda pairs: torch.optim.Adam(pairs, 1e-8),
    "fused": lambda pairs: torch.optim.AdamW(pairs, 1e-3, fused=True),
    "foreach": lambda pairs: torch.optim.RAdam(pairs, foreach=True),
    **{
        name: lambda pairs, name=name: getattr(torch.optim, name)(pairs)
        for name in ("Adagrad", "Adadelta", "Adamax", "NAdam", "RMSprop", "Rprop", "ASGD")
    },
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_are_right_on_shards(name: str) -> None:
    """Each element follows its own gradient."""
    verdict = check_elementwise(ELEMENTWISE[name], SHAPES)

    assert (verdict.kind, verdict.sentence, verdict.whole) == ("elementwise", "", ())
    assert verdict.is_right(parameters_split=True, model_split=True)


def test_adafactor_needs_whole_parameters() -> None:
    """It keeps rows and columns of second moments and clips each update by its size."""
    verdict = check_elementwise(torch.optim.Adafactor, SHAPES)

    assert (verdict.kind, verdict.name) == ("per-parameter", "Adafactor")
    assert verdict.sentence.startswith("Adafactor looks across a parameter's elements: embed.weight is updated")
    assert verdict.is_right(parameters_split=False, model_split=True)
    assert not verdict.is_right(parameters_split=True, model_split=False)


def test_muon_takes_matrices_only() -> None:
    """On matrices it needs each whole; given anything else it is not even built, and nothing is guessed."""
    verdict = check_elementwise(torch.optim.Muon, MATRICES)
    unknown = check_elementwise(torch.optim.Muon, SHAPES)

    assert (verdict.kind, verdict.name, verdict.whole) == ("per-parameter", "Muon", tuple(MATRICES))
    assert unknown.kind == "unknown"
    assert "Muon only supports 2D parameters" in unknown.sentence
    assert not unknown.is_right(parameters_split=True, model_split=False)


def test_a_trust_ratio_is_seen() -> None:
    """By parameter or by the whole model, without a name to go by; the sentence says which moves which."""
    one = check_elementwise(lambda pairs: TrustRatio(pairs, everything=False), SHAPES)
    everything = check_elementwise(lambda pairs: TrustRatio(pairs, everything=True), SHAPES)

    assert one.kind == "per-parameter"
    assert everything.kind == "global"
    assert everything.sentence.startswith("TrustRatio looks across parameters: the gradient of ")
    assert not everything.is_right(parameters_split=False, model_split=True)
    assert everything.is_right(parameters_split=False, model_split=False)


def test_only_what_needs_it_is_kept_whole() -> None:
    """An optimizer that treats some parameters by element says which ones it does not."""

    class Mixed(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in (p for group in self.param_groups for p in group["params"] if p.dim() == 2):
                p.grad.div_(p.grad.norm())
            super().step()

    verdict = check_elementwise(lambda pairs: Mixed(pairs, 0.1), SHAPES)

    assert (verdict.kind, verdict.whole) == ("per-parameter", tuple(MATRICES))


def test_lbfgs_is_global_and_needs_a_closure() -> None:
    """Its line and its history run through all parameters."""
    verdict = check_elementwise(torch.optim.LBFGS, {"a": (4, 4), "b": (4,)})

    assert (verdict.kind, verdict.name, verdict.needs_closure) == ("global", "LBFGS", True)


def test_sparse_gradients_are_told_apart() -> None:
    """SparseAdam takes no other."""
    verdict = check_elementwise(torch.optim.SparseAdam, MATRICES)

    assert (verdict.kind, verdict.name) == ("sparse", "SparseAdam")
    assert not verdict.is_right(parameters_split=False, model_split=False)


def test_a_factory_that_fails_is_unknown() -> None:
    """The user's own error is passed on in one line."""

    def factory(pairs: Any) -> torch.optim.Optimizer:
        raise KeyError("head.weight")

    verdict = check_elementwise(factory, SHAPES)

    assert verdict.kind == "unknown"
    assert "KeyError: 'head.weight'" in verdict.sentence


def test_the_generator_is_left_alone() -> None:
    """The trial draws nothing from the run's random numbers."""
    before = torch.get_rng_state()
    check_elementwise(default_optimizer, SHAPES)

    assert torch.equal(torch.get_rng_state(), before)
