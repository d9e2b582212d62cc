"""Random numbers switched off, without leaving train mode: for comparing a plan with one device.

Every random operator gives its mean instead, on both sides: a dropout or drop-path mask keeps everything at full
scale, noise is zero, a permutation is the identity. Python's and numpy's generators are reseeded.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoRandomness", "reseed_python"]


def _fill(tensor: torch.Tensor, value: float) -> torch.Tensor:
    return tensor.fill_(value)


def _mean_uniform(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    low = args[1] if len(args) > 1 else kwargs.get("from", 0.0)
    high = args[2] if len(args) > 2 else kwargs.get("to", 1.0)
    return (float(low) + float(high)) / 2


def _mean_normal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    return float(args[1] if len(args) > 1 else kwargs.get("mean", 0.0))


def _bernoulli_inplace(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | float:
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    return p if isinstance(p, torch.Tensor) else float(p)


_IN_PLACE: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], Any]] = {
    "bernoulli_": _bernoulli_inplace,
    "uniform_": _mean_uniform,
    "normal_": _mean_normal,
    "exponential_": lambda args, kwargs: 1.0 / float(args[1] if len(args) > 1 else kwargs.get("lambd", 1.0)),
    "cauchy_": lambda args, kwargs: 0.0,
    "log_normal_": lambda args, kwargs: 1.0,
    "geometric_": lambda args, kwargs: 1.0,
    "random_": lambda args, kwargs: 0.0,
}

_NEW = {"rand": 0.5, "rand_like": 0.5, "randn": 0.0, "randn_like": 0.0, "randint": 0, "randint_like": 0}


class NoRandomness(TorchDispatchMode):
    """Within, random operators give their mean."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if name in _IN_PLACE:
            value = _IN_PLACE[name](args, kwargs)
            return args[0].copy_(value.expand_as(args[0])) if isinstance(value, torch.Tensor) else _fill(args[0], value)
        if name in _NEW:
            return torch.full_like(func(*args, **kwargs), _NEW[name])
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "bernoulli":
            p = args[1] if len(args) > 1 else args[0]
            return torch.full_like(args[0], p) if isinstance(p, float) else p.clone()
        if name == "normal":
            return torch.zeros_like(func(*args, **kwargs))
        if name == "randperm":
            result = func(*args, **kwargs)
            return torch.arange(result.numel(), dtype=result.dtype, device=result.device)
        if name == "multinomial":
            return args[0].topk(args[1], dim=-1).indices
        if name in ("rrelu_with_noise", "rrelu_with_noise_"):
            lower, upper = float(args[2]), float(args[3])
            return torch.nn.functional.leaky_relu(args[0], (lower + upper) / 2)
        if name.startswith(("_scaled_dot_product", "_flash_attention", "_efficient_attention")):
            return func(
                *_without_dropout(func, args), **{**kwargs, **({"dropout_p": 0.0} if "dropout_p" in kwargs else {})}
            )
        raise RuntimeError(f"verify cannot switch off the random operator {func}")


def _without_dropout(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [argument.name for argument in func._schema.arguments]
    return tuple(0.0 if names[i] == "dropout_p" else value for i, value in enumerate(args))


def reseed_python() -> None:
    """Python's and numpy's global generators, as models use them for masks, start anew."""
    import numpy

    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002  the global generator is the one that models draw from
