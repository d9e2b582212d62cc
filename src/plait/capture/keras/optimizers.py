"""Keras' optimizers as torch's, with what stands around the rule: clipping, decay, averages, constraints, schedules.

A step, in Keras' order: gradients are gathered over `gradient_accumulation_steps` steps, clipped (by each one's norm or by
value; the global norm is the Job's), the weight decays apart from the gradient (theta -= lr * decay * theta; AdamW's default is 0.004,
not 0.01), the rule moves it (`plait.capture.keras.rules`), its moving average follows and now and then takes its place, its
constraint is applied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from plait.capture.keras.context import in_double, quiet_keras
from plait.capture.keras.module import Shared
from plait.capture.keras.rules import RULES
from plait.errors import TargetError

__all__ = ["KerasOptimizer", "KerasSchedule", "optimizer_factory", "schedule_factory", "unscaled"]

_AROUND = ("weight_decay", "clipnorm", "clipvalue", "gradient_accumulation_steps", "ema_overwrite_frequency")


class KerasOptimizer(torch.optim.Optimizer):
    """One of Keras' optimizers, by its name and settings."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        rule: str,
        lr: float,
        decayed: Callable[[str], bool] = lambda _name: True,
        constraints: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """`settings`: the rule's own (`beta_1` ...) and those of every optimizer (`weight_decay`, `clipnorm` ...).

        `decayed(name)`: whether it decays. `constraints`: Keras' constraint of a parameter by its name.
        """
        self._rule = rule
        decay = settings.pop("weight_decay", None) or 0.0
        groups: dict[float, list[nn.Parameter]] = {}
        self._constraints: dict[int, Any] = {}
        for name, parameter in named:
            groups.setdefault(decay if decayed(name) else 0.0, []).append(parameter)
            if constraints and name in constraints:
                self._constraints[id(parameter)] = constraints[name]
        made = [{"params": members, "weight_decay": value} for value, members in groups.items()]
        super().__init__(made, {"lr": lr, "weight_decay": decay, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; `closure`, if there is one, is called first and its value given back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        gradient = _gathered(parameter.grad, state, group.get("gradient_accumulation_steps") or 1)
        if gradient is not None:
            state["step"] = state.get("step", 0) + 1
            lr = float(group["lr"])
            if group["weight_decay"]:
                parameter.sub_(parameter * (group["weight_decay"] * lr))
            RULES[self._rule][0](parameter, _clipped(gradient, group), state, group, lr, int(state["step"]))
        if group.get("ema_momentum") is not None:
            _average(parameter, state, group)
        constraint = self._constraints.get(id(parameter))
        if constraint is not None:
            parameter.copy_(_constrained(constraint, parameter))


def _gathered(gradient: Any, state: dict[str, Any], steps: int) -> torch.Tensor | None:
    """The mean of the last `steps` gradients; None before they are all there."""
    if steps == 1:
        return gradient  # type: ignore[no-any-return]
    state["calls"] = state.get("calls", 0) + 1
    if "gathered" not in state:
        state["gathered"] = torch.zeros_like(gradient)
    if state["calls"] % steps:
        state["gathered"].add_(gradient)
        return None
    mean: torch.Tensor = (gradient + state["gathered"]) / steps
    state["gathered"].zero_()
    return mean


def _clipped(gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    if group.get("clipnorm"):
        norm = torch.linalg.vector_norm(gradient)
        scale: torch.Tensor = group["clipnorm"] / torch.clamp(norm, min=group["clipnorm"])
        return gradient * scale
    if group.get("clipvalue"):
        return gradient.clamp(-group["clipvalue"], group["clipvalue"])
    return gradient


def _average(parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
    """The moving average follows the parameter from its first value on, and takes its place every so many updates."""
    steps = group.get("gradient_accumulation_steps") or 1
    done = int(state["step"]) - 1 if steps == 1 else (int(state["calls"]) - 1) // steps
    keep = group["ema_momentum"] if done else 0.0
    if "average" not in state:
        state["average"] = torch.zeros_like(parameter)
    state["average"].mul_(keep).add_(parameter, alpha=1 - keep)
    if (done + 1) % group["ema_overwrite_frequency"] == 0:
        parameter.copy_(state["average"])


def _constrained(constraint: Shared, parameter: torch.Tensor) -> torch.Tensor:
    with quiet_keras(parameter.device), in_double(is_needed=parameter.dtype == torch.float64):
        found: torch.Tensor = constraint.value(parameter.detach())
        return found


class KerasSchedule(torch.optim.lr_scheduler.LRScheduler):
    """One of Keras' learning-rate schedules: the rate of step n, counted from 0."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Shared) -> None:
        """`schedule` holds a function of the step."""
        self._schedule = schedule
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rate of every group."""
        return [_number(self._schedule.value(self.last_epoch))] * len(self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """All but the schedule, which comes from the model."""
        return {key: value for key, value in super().state_dict().items() if key != "_schedule"}


def _number(value: Any) -> float:
    return float(value.detach().cpu()) if isinstance(value, torch.Tensor) or hasattr(value, "detach") else float(value)


def unscaled(optimizer: Any, layers: Iterable[Any]) -> Any:
    """The optimizer itself where it scales the loss, which changes no number unless something is computed in float16.

    Raises:
        TargetError: a layer computes in float16.
    """
    import keras

    is_scaler = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if is_scaler or optimizer.loss_scale_factor:
        half = next((layer for layer in layers if layer.compute_dtype == "float16"), None)
        if half is not None:
            raise TargetError(
                f"keras layer {half.name!r} computes in float16 under a scaled loss, which plait does not follow",
                hint="use the policy mixed_bfloat16, which needs no scale",
            )
    return optimizer.inner_optimizer if is_scaler else optimizer


def optimizer_factory(optimizer: Any, variables: dict[str, Any]) -> Callable[[Any], KerasOptimizer]:
    """What makes the optimizer of (name, parameter) pairs. `variables`: a parameter's name -> its Keras variable.

    Raises:
        TargetError: the optimizer, or a setting of it, is one that plait does not reproduce.
    """
    rule = type(optimizer).__name__
    if rule not in RULES or not type(optimizer).__module__.startswith("keras."):
        raise TargetError(
            f"keras optimizer {rule} is not reproduced here",
            hint=f"use Keras' {', '.join(RULES)}, or give plait.Job an optimizer of torch's",
        )
    _refuse_settings(optimizer, rule)
    settings = {name: _plain(getattr(optimizer, name)) for name in RULES[rule][1]}
    settings |= {name: getattr(optimizer, name, None) for name in _AROUND}
    if optimizer.use_ema:
        settings["ema_momentum"] = float(optimizer.ema_momentum)
    excluded: set[int] = getattr(optimizer, "_exclude_from_weight_decay", set())
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)

    def decayed(name: str) -> bool:
        variable = variables.get(name)
        if variable is None:
            return True
        return id(variable) not in excluded and (pattern is None or re.search(pattern, variable.name) is None)

    settings |= {"rule": rule, "lr": _number(optimizer.learning_rate), "decayed": decayed}
    settings["constraints"] = {n: Shared(v.constraint) for n, v in variables.items() if v.constraint is not None}

    def factory(named: Any) -> KerasOptimizer:
        return KerasOptimizer(named, **settings)

    return factory


def _refuse_settings(optimizer: Any, rule: str) -> None:
    where = f"keras optimizer {rule}"
    if _number(optimizer.iterations):
        raise TargetError(
            f"{where} has taken {int(_number(optimizer.iterations))} steps, and what it keeps of them is not taken over",
            hint="start it anew: model.compile(optimizer=type(model.optimizer).from_config(model.optimizer.get_config()), ...)",
        )
    if optimizer.use_ema and not optimizer.ema_overwrite_frequency:
        raise TargetError(
            f"{where}: use_ema puts its averages in place when fit ends, which is no part of a step",
            hint="set ema_overwrite_frequency=N, or average with torch.optim.swa_utils.AveragedModel",
        )
    if optimizer.gradient_accumulation_steps and optimizer.global_clipnorm:
        raise TargetError(
            f"{where}: gradient_accumulation_steps with global_clipnorm is not reproduced here",
            hint="accumulate with microbatches=N in --plan, which clips the mean as Keras does",
        )


def schedule_factory(optimizer: Any) -> Callable[[torch.optim.Optimizer], KerasSchedule] | None:
    """What makes the learning-rate scheduler; None where the rate is one number."""
    import keras

    rate = optimizer._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        shared = Shared(rate)
    elif callable(rate) and not isinstance(rate, keras.Variable):
        shared = Shared(lambda _step: rate())
    else:
        return None
    return lambda torch_optimizer: KerasSchedule(torch_optimizer, shared)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) or value is None else _number(value)
