"""What the processes of the tests do: verify a target, with something broken on purpose or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from plait.capture.target import load_target
from plait.errors import RequestError
from plait.run.verify import Verdict, verify


def verdict_of(target: str, plan: str, batch: int = 8, steps: int = 2, broken: str = "") -> Verdict | str:
    """The verdict, or the refusal's text."""
    with BREAKS[broken]():
        try:
            return verify(load_target(target), plan, batch=batch, steps=steps)
        except RequestError as problem:
            return str(problem)


def _without_a_reduction() -> contextlib.AbstractContextManager[Any]:
    """The first parameter is left out of the replicas' sum."""
    from plait.run.reduce import Reducer

    whole = Reducer.__init__
    return mock.patch.object(
        Reducer, "__init__", lambda self, parameters, *a, **k: whole(self, list(parameters)[1:], *a, **k)
    )


def _without_ties() -> contextlib.AbstractContextManager[Any]:
    """Stages that share a weight keep their own part of its gradient."""
    from plait.run.tied import TiedWeights

    return mock.patch.object(TiedWeights, "sum_gradients", return_value=None)


def _equal_weights() -> contextlib.AbstractContextManager[Any]:
    """Every microbatch counts the same, however many samples it has."""
    from plait.run.start import Run

    whole = Run._parts

    def parts(self: Run, *args: Any) -> tuple[Any, list[float]]:
        found, weights = whole(self, *args)
        return found, [1 / len(weights)] * len(weights)

    return mock.patch.object(Run, "_parts", parts)


def _other_seed() -> contextlib.AbstractContextManager[Any]:
    """The second process starts one parameter from other random numbers."""
    from plait.run import apply

    whole = apply._Filler._value

    def value(self: Any, name: str, kind: str) -> torch.Tensor:
        found = whole(self, name, kind)
        if name == "layers.1.weight" and self._world.rank == 1:
            with torch.no_grad():
                found.copy_(torch.randn(found.shape) * found.std())
        return found

    return mock.patch.object(apply._Filler, "_value", value)


def _lost_gradient() -> contextlib.AbstractContextManager[Any]:
    """A parameter never gets its gradient."""
    from plait.run.start import Run

    whole = Run._complete_gradients

    def complete(self: Run) -> None:
        whole(self)
        for name, held in self.applied.parameters.items():
            if name == "layers.1.bias":
                held.tensor.grad = None

    return mock.patch.object(Run, "_complete_gradients", complete)


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


BREAKS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "": _nothing,
    "reduction": _without_a_reduction,
    "ties": _without_ties,
    "weights": _equal_weights,
    "seed": _other_seed,
    "gradient": _lost_gradient,
}
