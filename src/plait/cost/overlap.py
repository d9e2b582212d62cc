"""How much of a communication compute hides, and what that costs the compute.

Hidden communication takes streaming multiprocessors, memory bandwidth and power from compute: each hidden second adds
`slowdown` seconds (Rashidi et al. 2021, arXiv 2007.00156, measure 1.1 to 1.4 times slower compute). On TPUs the
network engine is separate and the slowdown near zero. Known error: which kernel meets which message is not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Shown", "hide"]


@dataclass(frozen=True, slots=True)
class Shown:
    """A communication, split."""

    exposed: float
    """Seconds that compute waits, slowdown included."""
    hidden: float


def hide(seconds: float, *, beside: float, fraction: float, slowdown: float, tail: float = 0.0) -> Shown:
    """`seconds` of communication of which `fraction` may run beside `beside` seconds of compute; `tail` never can."""
    tail = min(tail, seconds)
    hidden = min((seconds - tail) * fraction, beside * fraction)
    return Shown(seconds - hidden + slowdown * hidden, hidden)
