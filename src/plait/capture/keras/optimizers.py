"""Keras' optimizers as torch's: the same numbers, which torch's own classes of the same names do not give.

What differs (Keras 3.15 against torch 2.13):

    SGD        the learning rate goes into the momentum, so that a change of rate does not rescale what is there
    Adam...    epsilon is added to sqrt(v) before the bias correction, not after; its default is 1e-7, not 1e-8
    RMSprop    epsilon under the square root; rho is torch's alpha, 0.9 and not 0.99
    Adagrad    epsilon under the square root, accumulators start at 0.1, not 0
    Nadam      the momentum's schedule is 0.96^t, where torch has 0.96^(0.004 t)
    all        weight decay is decoupled (theta -= lr * decay * theta before the step), AdamW's default 0.004, not 0.01
    all        gradients clipped by value, by each one's norm, or by the global norm, as the optimizer says

Every rule is element by element except `clipnorm`, which needs a parameter's whole gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from plait.capture.keras.module import Shared
from plait.errors import TargetError

__all__ = ["KerasOptimizer", "KerasSchedule", "optimizer_factory", "schedule_factory"]

_State = dict[str, Any]
_Rule = Callable[[torch.Tensor, torch.Tensor, _State, dict[str, Any], float, int], None]
"""(parameter, gradient, state, settings, learning rate, step from 1): moves the parameter."""


def _zeros(state: _State, name: str, like: torch.Tensor, start: float = 0.0) -> torch.Tensor:
    if name not in state:
        state[name] = torch.full_like(like, start, memory_format=torch.preserve_format)
    found: torch.Tensor = state[name]
    return found


def _power(base: float, exponent: int, like: torch.Tensor) -> torch.Tensor:
    """base ** exponent in the parameter's precision, as Keras has it: 1 - 0.999 is 5e-5 larger in single precision."""
    return torch.pow(torch.tensor(base, dtype=like.dtype), torch.tensor(float(exponent), dtype=like.dtype)).to(
        like.device
    )


def _sgd(p: torch.Tensor, g: torch.Tensor, state: _State, s: dict[str, Any], lr: float, _t: int) -> None:
    if not s["momentum"]:
        p.sub_(g * lr)
        return
    m = _zeros(state, "momentum", p).mul_(s["momentum"]).sub_(g * lr)
    p.add_(m * s["momentum"] - g * lr if s["nesterov"] else m)


def _adam(p: torch.Tensor, g: torch.Tensor, state: _State, s: dict[str, Any], lr: float, t: int) -> None:
    m = _zeros(state, "momentum", p).mul_(s["beta_1"]).add_(g, alpha=1 - s["beta_1"])
    v = _zeros(state, "velocity", p).mul_(s["beta_2"]).add_(g * g, alpha=1 - s["beta_2"])
    if s["amsgrad"]:
        v = torch.maximum(_zeros(state, "velocity_hat", p), v, out=state["velocity_hat"])
    alpha = lr * (1 - _power(s["beta_2"], t, p)).sqrt() / (1 - _power(s["beta_1"], t, p))
    p.sub_((m * alpha) / (v.sqrt() + s["epsilon"]))


def _rmsprop(p: torch.Tensor, g: torch.Tensor, state: _State, s: dict[str, Any], lr: float, _t: int) -> None:
    rho = s["rho"]
    v = _zeros(state, "velocity", p).mul_(rho).add_(g * g, alpha=1 - rho)
    under = v + s["epsilon"]
    if s["centered"]:
        average = _zeros(state, "average_gradient", p).mul_(rho).add_(g, alpha=1 - rho)
        under = under - average * average
    move = g * lr / under.sqrt()
    if s["momentum"]:
        move = _zeros(state, "momentum", p).mul_(s["momentum"]).add_(move)
    p.sub_(move)


def _adagrad(p: torch.Tensor, g: torch.Tensor, state: _State, s: dict[str, Any], lr: float, _t: int) -> None:
    total = _zeros(state, "accumulator", p, s["initial_accumulator_value"]).add_(g * g)
    p.sub_(g * lr / (total + s["epsilon"]).sqrt())


def _adamax(p: torch.Tensor, g: torch.Tensor, state: _State, s: dict[str, Any], lr: float, t: int) -> None:
    m = _zeros(state, "momentum", p).mul_(s["beta_1"]).add_(g, alpha=1 - s["beta_1"])
    u = torch.maximum(_zeros(state, "norm", p).mul_(s["beta_2"]), g.abs(), out=state["norm"])
    p.sub_(m * lr / ((u + s["epsilon"]) * (1 - _power(s["beta_1"], t, p))))


def _nadam(p: torch.Tensor, g: torch.Tensor, state: _State, s: dict[str, Any], lr: float, t: int) -> None:
    def share(step: int) -> torch.Tensor:
        found: torch.Tensor = (1.0 - 0.5 * _power(0.96, step, p)) * s["beta_1"]
        return found

    product = state["product"] = state.get("product", 1.0) * share(t)
    m = _zeros(state, "momentum", p).mul_(s["beta_1"]).add_(g, alpha=1 - s["beta_1"])
    v = _zeros(state, "velocity", p).mul_(s["beta_2"]).add_(g * g, alpha=1 - s["beta_2"])
    m_hat = m * (share(t + 1) / (1 - product * share(t + 1))) + g * ((1 - share(t)) / (1 - product))
    p.sub_(m_hat * lr / ((v / (1 - _power(s["beta_2"], t, p))).sqrt() + s["epsilon"]))


def _lion(p: torch.Tensor, g: torch.Tensor, state: _State, s: dict[str, Any], lr: float, _t: int) -> None:
    m = _zeros(state, "momentum", p)
    p.sub_(torch.sign(m * s["beta_1"] + g * (1 - s["beta_1"])) * lr)
    m.mul_(s["beta_2"]).add_(g, alpha=1 - s["beta_2"])


def _adadelta(p: torch.Tensor, g: torch.Tensor, state: _State, s: dict[str, Any], lr: float, _t: int) -> None:
    rho, eps = s["rho"], s["epsilon"]
    seen = _zeros(state, "accumulated_grad", p).mul_(rho).add_(g * g, alpha=1 - rho)
    moved = _zeros(state, "accumulated_delta_var", p)
    delta = -((moved + eps).sqrt() * g / (seen + eps).sqrt())
    moved.mul_(rho).add_(delta * delta, alpha=1 - rho)
    p.add_(delta * lr)


_RULES: dict[str, tuple[_Rule, tuple[str, ...]]] = {
    "SGD": (_sgd, ("momentum", "nesterov")),
    "Adam": (_adam, ("beta_1", "beta_2", "epsilon", "amsgrad")),
    "AdamW": (_adam, ("beta_1", "beta_2", "epsilon", "amsgrad")),
    "RMSprop": (_rmsprop, ("rho", "momentum", "epsilon", "centered")),
    "Adagrad": (_adagrad, ("initial_accumulator_value", "epsilon")),
    "Adamax": (_adamax, ("beta_1", "beta_2", "epsilon")),
    "Nadam": (_nadam, ("beta_1", "beta_2", "epsilon")),
    "Lion": (_lion, ("beta_1", "beta_2")),
    "Adadelta": (_adadelta, ("rho", "epsilon")),
}
_REFUSED = ("use_ema", "loss_scale_factor", "gradient_accumulation_steps")


class KerasOptimizer(torch.optim.Optimizer):
    """One of Keras' optimizers, by its name and settings."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], *, rule: str, lr: float, **settings: Any) -> None:
        """`settings`: the rule's own (`beta_1` ...), `weight_decay`, `clipnorm`, `clipvalue`; `decayed(name)`: whether it decays."""
        self._rule, self._decayed = rule, settings.pop("decayed", lambda _name: True)
        decay = settings.pop("weight_decay", None) or 0.0
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in named:
            groups.setdefault(decay if self._decayed(name) else 0.0, []).append(parameter)
        made = [{"params": members, "weight_decay": value} for value, members in groups.items()]
        super().__init__(made, {"lr": lr, "weight_decay": decay, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; `closure`, if there is one, is called first and its value given back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        function = _RULES[self._rule][0]
        for group in self.param_groups:
            lr = float(group["lr"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                gradient = _clipped(parameter.grad, group)
                if group["weight_decay"]:
                    parameter.sub_(parameter * (group["weight_decay"] * lr))
                function(parameter, gradient, state, group, lr, int(state["step"]))
        return loss


def _clipped(gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    if group.get("clipnorm"):
        norm = torch.linalg.vector_norm(gradient)
        scale: torch.Tensor = group["clipnorm"] / torch.clamp(norm, min=group["clipnorm"])
        return gradient * scale
    if group.get("clipvalue"):
        return gradient.clamp(-group["clipvalue"], group["clipvalue"])
    return gradient


class KerasSchedule(torch.optim.lr_scheduler.LRScheduler):
    """One of Keras' learning-rate schedules: the rate of step n, counted from 0."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Shared) -> None:
        self._schedule = schedule
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rate of every group."""
        return [_number(self._schedule.value(self.last_epoch))] * len(self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """All but the schedule, which comes from the model."""
        return {key: value for key, value in super().state_dict().items() if key != "_schedule"}


def _number(value: Any) -> float:
    return float(value.detach().cpu()) if isinstance(value, torch.Tensor) else float(value)


def optimizer_factory(optimizer: Any, keras_names: dict[str, str]) -> Callable[[Any], KerasOptimizer]:
    """What makes the optimizer of (name, parameter) pairs. `keras_names`: a parameter's name -> its Keras variable's name.

    Raises:
        TargetError: the optimizer, or a setting of it, is one that plait does not reproduce.
    """
    rule = type(optimizer).__name__
    if rule not in _RULES:
        raise TargetError(
            f"keras optimizer {rule} is not reproduced here",
            hint=f"use one of {', '.join(_RULES)}, or give plait.Job an optimizer of torch's",
        )
    for setting in _REFUSED:
        if getattr(optimizer, setting, None):
            hint = "accumulate with microbatches=N in --plan" if setting == "gradient_accumulation_steps" else ""
            raise TargetError(f"keras optimizer {rule}: {setting} is not reproduced here", hint=hint)
    settings = {name: _plain(getattr(optimizer, name)) for name in _RULES[rule][1]}
    settings |= {name: getattr(optimizer, name, None) for name in ("weight_decay", "clipnorm", "clipvalue")}
    excluded = {str(key) for key in getattr(optimizer, "_exclude_from_weight_decay", set())}
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    if excluded:
        raise TargetError(
            f"keras optimizer {rule}: exclude_from_weight_decay(var_list=...) is not reproduced here",
            hint="exclude by var_names=...",
        )

    def decayed(name: str) -> bool:
        return pattern is None or re.search(pattern, keras_names.get(name, name)) is None

    lr = _number(optimizer.learning_rate)

    def factory(named: Any) -> KerasOptimizer:
        return KerasOptimizer(named, rule=rule, lr=lr, decayed=decayed, **settings)

    return factory


def schedule_factory(optimizer: Any) -> Callable[[torch.optim.Optimizer], KerasSchedule] | None:
    """What makes the learning-rate scheduler; None where the rate is one number."""
    import keras

    schedule = optimizer._learning_rate
    if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        shared = Shared(schedule)
        return lambda torch_optimizer: KerasSchedule(torch_optimizer, shared)
    return None


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) or value is None else _number(value)
