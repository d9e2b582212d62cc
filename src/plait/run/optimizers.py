"""Whether an optimizer is right on shards, found by trying it.

Small stand-in parameters with the user's own names take a few steps with fixed gradients: whole, as halves (each
half under an optimizer of its own, as two processes would have them), and with some gradients changed.

    the halves move as the whole does                   elementwise     right on any shard
    a half moves otherwise                              per-parameter   right where parameters are whole (dp, pp)
    a parameter moves with another one's gradient       global          right where all parameters are in one place (dp)

What the trial cannot see: coupling that sets in after more than three steps, or only for sizes beyond the stand-ins' 160.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from plait.run.layout import split_evenly

__all__ = ["OptimizerVerdict", "check_elementwise", "default_optimizer"]

Factory = Callable[[list[tuple[str, nn.Parameter]]], Any]
_Values = list[torch.Tensor]

_STEPS = 3
_LARGE = 160  # above 128, from which some factored optimizers treat a dim as worth factoring
_SMALL = 6
_BUDGET = 1 << 20  # elements in all stand-ins, 8 MiB
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest move; shards may round sums differently


@dataclass(frozen=True, slots=True)
class OptimizerVerdict:
    """How far an optimizer looks."""

    kind: Literal["elementwise", "per-parameter", "global", "sparse", "unknown"]
    name: str
    """Of the optimizer's class."""
    sentence: str
    """Why it is not elementwise, for an error message; empty when it is."""
    whole: tuple[str, ...] = ()
    """Parameters that it moves otherwise when they are split; of "global" and "sparse", "unknown": all."""
    needs_closure: bool = False
    """Whether `step` asks for a function that computes the loss again."""

    def is_right(self, *, parameters_split: bool, model_split: bool) -> bool:
        """Whether it may run: `parameters_split` under fsdp or tp, `model_split` under pp."""
        match self.kind:
            case "elementwise":
                return True
            case "per-parameter":
                return not parameters_split
            case "global" | "unknown":
                return not parameters_split and not model_split
            case "sparse":
                return False


def default_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW at a rate of 1e-3, torch's other defaults."""
    return torch.optim.AdamW(list(named_parameters), lr=1e-3)


def check_elementwise(factory: Factory, named_shapes: Mapping[str, Sequence[int]]) -> OptimizerVerdict:
    """The verdict on the optimizer that `factory` makes of (name, parameter) pairs.

    `named_shapes` are the trainable parameters' whole shapes; the factory is called a few times with stand-ins of the
    same names and numbers of dims. Takes about a second for a hundred parameters, four for a thousand; generators are left as
    they were. An optimizer that cannot be tried is "unknown", never "elementwise".
    """
    try:
        with torch.random.fork_rng(devices=[]):
            return _try(factory, named_shapes)
    except Exception as problem:
        why = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
        sentence = f"the optimizer could not be tried on small parameters of the same names ({why})"
        return OptimizerVerdict("unknown", "optimizer", sentence, tuple(named_shapes))


def _try(factory: Factory, named_shapes: Mapping[str, Sequence[int]]) -> OptimizerVerdict:
    names = list(named_shapes)
    problem: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        trial = _Trial(factory, names, _stand_ins(named_shapes, dtype))
        try:
            trial.whole()
        except Exception as error:
            problem = problem or error
            if trial.takes_sparse():
                sentence = f"{trial.name} works on sparse gradients, which are not reduced over processes or sharded"
                return OptimizerVerdict("sparse", trial.name, sentence, tuple(names))
            continue
        return _verdict(trial, names)
    assert problem is not None
    raise problem


def _verdict(trial: _Trial, names: list[str]) -> OptimizerVerdict:
    pair = trial.coupled()
    if pair is not None:
        sentence = f"{trial.name} looks across parameters: the gradient of {pair[0]} changes the update of {pair[1]}"
        return OptimizerVerdict("global", trial.name, sentence, tuple(names), trial.needs_closure)
    dims = {name: dim for dim in (1, 0) for name in trial.moved_otherwise(dim)}
    if dims:
        whole = tuple(name for name in names if name in dims)
        sentence = (
            f"{trial.name} looks across a parameter's elements: {whole[0]} is updated differently "
            f"when it is split along dim {dims[whole[0]]}"
        )
        return OptimizerVerdict("per-parameter", trial.name, sentence, whole, trial.needs_closure)
    return OptimizerVerdict("elementwise", trial.name, "", (), trial.needs_closure)


def _stand_ins(named_shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> _Values:
    """Small parameters with the same number of dims; some of each number, as far as the budget goes, fairly large."""
    generator = torch.Generator().manual_seed(0)
    left = _BUDGET
    found = []
    for shape in named_shapes.values():
        large = [min(size, _LARGE) for size in shape]
        if len(shape) > 2:  # kernels of convolutions: the dims behind the second stay small
            large = [*large[:2], *(min(size, _SMALL) for size in shape[2:])]
        if math.prod(large) > left:
            large = [min(size, _SMALL) for size in shape]
        left -= math.prod(large)
        found.append(torch.randn(large, generator=generator, dtype=dtype))
    return found


class _Trial:
    """Steps of fresh optimizers from the same values with the same gradients."""

    def __init__(self, factory: Factory, names: list[str], start: _Values) -> None:
        self._factory = factory
        self._names = names
        self._start = start
        generator = torch.Generator().manual_seed(1)
        self._gradients = [
            [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in start] for _ in range(_STEPS)
        ]
        self._reference: _Values = []
        self.name = "optimizer"
        self.needs_closure = False

    def whole(self) -> None:
        """The reference; finds out whether a closure is needed."""
        try:
            self._reference = self._moves(self._start, self._gradients)
        except TypeError as problem:
            if "closure" not in str(problem):
                raise
            self.needs_closure = True
            self._reference = self._moves(self._start, self._gradients)

    def takes_sparse(self) -> bool:
        """Whether it steps when the gradients are sparse."""
        sparse = [[g.to_sparse() if g.dim() else g for g in gradients] for gradients in self._gradients]
        try:
            self._moves(self._start, sparse)
        except Exception:
            return False
        return True

    def moved_otherwise(self, dim: int) -> list[str]:
        """Parameters that move in another way when each is cut in two along `dim`."""
        halves = []
        for index in range(2):
            gradients = [[_half(g, dim, index) for g in step] for step in self._gradients]
            halves.append(self._moves([_half(value, dim, index) for value in self._start], gradients))
        found = []
        for name, reference, first, second in zip(self._names, self._reference, *halves, strict=True):
            parts = [(_half(reference, dim, index), part) for index, part in enumerate((first, second))]
            if not all(self._close(part, expected, reference) for expected, part in parts):
                found.append(name)
        return found

    def coupled(self) -> tuple[str, str] | None:
        """(changed, moved): two parameters of which one moves with the gradient of the other; None if there are none.

        Changes the gradients of all parameters whose number has a certain bit, then of all others, for each bit: two
        different numbers differ in one.
        """
        count = len(self._names)
        for bit in range((count - 1).bit_length()):
            for value in (0, 1):
                changed = [index for index in range(count) if (index >> bit) & 1 == value]
                moved = self._moved_by(changed)
                if moved:
                    guilty = next((i for i in changed if moved[0] in self._moved_by([i])), changed[0])
                    return self._names[guilty], self._names[moved[0]]
        return None

    def _moved_by(self, changed: list[int]) -> list[int]:
        """Numbers of other parameters that move otherwise when the gradients of `changed` do."""
        chosen = set(changed)
        gradients = [
            [_other(gradient) if i in chosen else gradient for i, gradient in enumerate(step)]
            for step in self._gradients
        ]
        moves = self._moves(self._start, gradients)
        return [
            i
            for i, (move, reference) in enumerate(zip(moves, self._reference, strict=True))
            if i not in chosen and not self._close(move, reference, reference)
        ]

    def _moves(self, start: _Values, gradients: list[_Values]) -> _Values:
        """How far each parameter goes in all steps."""
        torch.manual_seed(2)
        parameters = [nn.Parameter(value.clone()) for value in start]
        optimizer = self._factory(list(zip(self._names, parameters, strict=True)))
        self.name = type(optimizer).__name__
        for group in optimizer.param_groups:
            if "lr" in group and float(group["lr"]) == 0.0:
                group["lr"] = group["lr"] + 1e-2  # a warm-up's start would hide everything
        for step in gradients:

            def closure(step: _Values = step) -> torch.Tensor:
                for parameter, gradient in zip(parameters, step, strict=True):
                    parameter.grad = gradient.clone()
                return torch.ones(())

            loss = closure()
            assert loss.dim() == 0
            optimizer.step(closure) if self.needs_closure else optimizer.step()
        return [parameter.detach() - value for parameter, value in zip(parameters, start, strict=True)]

    @staticmethod
    def _close(move: torch.Tensor, expected: torch.Tensor, reference: torch.Tensor) -> bool:
        if not move.numel():
            return True
        scale = float(reference.abs().max())
        return bool(((move - expected).abs().max() <= _CLOSE[move.dtype] * scale).item())


def _other(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient of another size and direction."""
    return gradient.flip(0) * 3 + 1 if gradient.dim() else gradient * 3


def _half(value: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    """One half along `dim`; all of it where there is nothing to cut."""
    if value.dim() <= dim or value.shape[dim] < 2:
        return value
    start, stop = split_evenly(value.shape[dim], 2, index)
    return value.narrow(dim, start, stop - start)
