"""How each of Keras' optimizers moves one parameter: the same numbers, which torch's own classes of the same names do not give.

What differs (Keras 3.15 against torch 2.13):

    SGD        the learning rate goes into the momentum, so that a change of rate does not rescale what is there
    Adam...    epsilon is added to sqrt(v) before the bias correction, not after; its default is 1e-7, not 1e-8
    RMSprop    epsilon under the square root; rho is torch's alpha, 0.9 and not 0.99
    Adagrad    epsilon under the square root, accumulators start at 0.1, not 0
    Nadam      the momentum's schedule is 0.96^t, where torch has 0.96^(0.004 t)

Every rule is element by element except Lamb's, which needs the norm of the whole parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["RULES", "Rule", "State"]

State = dict[str, Any]
Rule = Callable[[torch.Tensor, torch.Tensor, State, dict[str, Any], float, int], None]
"""(parameter, gradient, state, settings, learning rate, step from 1): moves the parameter."""


def _zeros(state: State, name: str, like: torch.Tensor, start: float = 0.0) -> torch.Tensor:
    if name not in state:
        state[name] = torch.full_like(like, start, memory_format=torch.preserve_format)
    found: torch.Tensor = state[name]
    return found


def _power(base: float, exponent: int, like: torch.Tensor) -> torch.Tensor:
    """base ** exponent in the parameter's precision, as Keras has it: 1 - 0.999 is 5e-5 larger in single precision."""
    return torch.pow(torch.tensor(base, dtype=like.dtype), torch.tensor(float(exponent), dtype=like.dtype)).to(
        like.device
    )


def _sgd(p: torch.Tensor, g: torch.Tensor, state: State, s: dict[str, Any], lr: float, _t: int) -> None:
    if not s["momentum"]:
        p.sub_(g * lr)
        return
    m = _zeros(state, "momentum", p).mul_(s["momentum"]).sub_(g * lr)
    p.add_(m * s["momentum"] - g * lr if s["nesterov"] else m)


def _adam(p: torch.Tensor, g: torch.Tensor, state: State, s: dict[str, Any], lr: float, t: int) -> None:
    m = _zeros(state, "momentum", p).mul_(s["beta_1"]).add_(g, alpha=1 - s["beta_1"])
    v = _zeros(state, "velocity", p).mul_(s["beta_2"]).add_(g * g, alpha=1 - s["beta_2"])
    if s["amsgrad"]:
        v = torch.maximum(_zeros(state, "velocity_hat", p), v, out=state["velocity_hat"])
    alpha = lr * (1 - _power(s["beta_2"], t, p)).sqrt() / (1 - _power(s["beta_1"], t, p))
    p.sub_((m * alpha) / (v.sqrt() + s["epsilon"]))


def _rmsprop(p: torch.Tensor, g: torch.Tensor, state: State, s: dict[str, Any], lr: float, _t: int) -> None:
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


def _adagrad(p: torch.Tensor, g: torch.Tensor, state: State, s: dict[str, Any], lr: float, _t: int) -> None:
    total = _zeros(state, "accumulator", p, s["initial_accumulator_value"]).add_(g * g)
    p.sub_(g * lr / (total + s["epsilon"]).sqrt())


def _adamax(p: torch.Tensor, g: torch.Tensor, state: State, s: dict[str, Any], lr: float, t: int) -> None:
    m = _zeros(state, "momentum", p).mul_(s["beta_1"]).add_(g, alpha=1 - s["beta_1"])
    u = torch.maximum(_zeros(state, "norm", p).mul_(s["beta_2"]), g.abs(), out=state["norm"])
    p.sub_(m * lr / ((u + s["epsilon"]) * (1 - _power(s["beta_1"], t, p))))


def _nadam(p: torch.Tensor, g: torch.Tensor, state: State, s: dict[str, Any], lr: float, t: int) -> None:
    def share(step: int) -> torch.Tensor:
        found: torch.Tensor = (1.0 - 0.5 * _power(0.96, step, p)) * s["beta_1"]
        return found

    product = state["product"] = state.get("product", 1.0) * share(t)
    m = _zeros(state, "momentum", p).mul_(s["beta_1"]).add_(g, alpha=1 - s["beta_1"])
    v = _zeros(state, "velocity", p).mul_(s["beta_2"]).add_(g * g, alpha=1 - s["beta_2"])
    m_hat = m * (share(t + 1) / (1 - product * share(t + 1))) + g * ((1 - share(t)) / (1 - product))
    p.sub_(m_hat * lr / ((v / (1 - _power(s["beta_2"], t, p))).sqrt() + s["epsilon"]))


def _lion(p: torch.Tensor, g: torch.Tensor, state: State, s: dict[str, Any], lr: float, _t: int) -> None:
    m = _zeros(state, "momentum", p)
    p.sub_(torch.sign(m * s["beta_1"] + g * (1 - s["beta_1"])) * lr)
    m.mul_(s["beta_2"]).add_(g, alpha=1 - s["beta_2"])


def _adadelta(p: torch.Tensor, g: torch.Tensor, state: State, s: dict[str, Any], lr: float, _t: int) -> None:
    rho, eps = s["rho"], s["epsilon"]
    seen = _zeros(state, "accumulated_grad", p).mul_(rho).add_(g * g, alpha=1 - rho)
    moved = _zeros(state, "accumulated_delta_var", p)
    delta = -((moved + eps).sqrt() * g / (seen + eps).sqrt())
    moved.mul_(rho).add_(delta * delta, alpha=1 - rho)
    p.add_(delta * lr)


def _ftrl(p: torch.Tensor, g: torch.Tensor, state: State, s: dict[str, Any], lr: float, _t: int) -> None:
    total = _zeros(state, "accumulator", p, s["initial_accumulator_value"])
    linear, power = _zeros(state, "linear", p), -s["learning_rate_power"]
    new = total + g * g
    linear.add_(g + 2 * s["l2_shrinkage_regularization_strength"] * p - (new**power - total**power) / lr * p)
    quadratic = new**power / lr + 2 * (s["l2_regularization_strength"] + s["beta"] / (2 * lr))
    edge = s["l1_regularization_strength"]
    p.copy_((linear.clamp(-edge, edge) - linear) / quadratic)
    total.copy_(new)


def _lamb(p: torch.Tensor, g: torch.Tensor, state: State, s: dict[str, Any], lr: float, t: int) -> None:
    m = _zeros(state, "momentum", p)
    m.add_(g - m, alpha=1 - s["beta_1"])
    v = _zeros(state, "velocity", p)
    v.add_(g * g - v, alpha=1 - s["beta_2"])
    move = m / (1 - _power(s["beta_1"], t, p))
    move = move / ((v / (1 - _power(s["beta_2"], t, p))).sqrt() + s["epsilon"])
    long, step = (p * p).sum().sqrt(), (move * move).sum().sqrt()
    share = torch.where((long > 0) & (step > 0), long / torch.where(step > 0, step, 1.0), 1.0)
    p.sub_(share * lr * move)


RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {
    "SGD": (_sgd, ("momentum", "nesterov")),
    "Adam": (_adam, ("beta_1", "beta_2", "epsilon", "amsgrad")),
    "AdamW": (_adam, ("beta_1", "beta_2", "epsilon", "amsgrad")),
    "RMSprop": (_rmsprop, ("rho", "momentum", "epsilon", "centered")),
    "Adagrad": (_adagrad, ("initial_accumulator_value", "epsilon")),
    "Adamax": (_adamax, ("beta_1", "beta_2", "epsilon")),
    "Nadam": (_nadam, ("beta_1", "beta_2", "epsilon")),
    "Lion": (_lion, ("beta_1", "beta_2")),
    "Adadelta": (_adadelta, ("rho", "epsilon")),
    "Ftrl": (
        _ftrl,
        (
            *("learning_rate_power", "initial_accumulator_value", "l1_regularization_strength"),
            *("l2_regularization_strength", "l2_shrinkage_regularization_strength", "beta"),
        ),
    ),
    "Lamb": (_lamb, ("beta_1", "beta_2", "epsilon")),
}
"""Name of the class -> its rule and the settings that the rule reads."""
