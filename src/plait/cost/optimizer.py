"""Seconds of the optimizer step, the gradient norm and of adding one microbatch's gradients to the others.

Adam reads weight, gradient and two moments and writes all but the gradient: bound by memory bandwidth.
Source: Loshchilov and Hutter (2019), counted by bytes. Known error: an optimizer that is not fused moves
about three times as much; the fitted `optimizer` parameter covers that.
"""

from __future__ import annotations

__all__ = ["accumulate_seconds", "optimizer_seconds"]


def optimizer_seconds(owned: float, *, state_bytes: float, weight_bytes: float, bandwidth: float) -> float:
    """Seconds to update `owned` parameters: state read and written, fp32 gradient read, weight written."""
    return owned * (2 * state_bytes + 4 + weight_bytes) / bandwidth


def accumulate_seconds(held: float, *, new_bytes: float, kept_bytes: float, bandwidth: float) -> float:
    """Seconds to add one microbatch's gradients of `held` parameters to the sum."""
    return held * (new_bytes + 2 * kept_bytes) / bandwidth
