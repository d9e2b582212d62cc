"""What the processes of these tests run."""

from __future__ import annotations

import plait
from plait.capture.target import load_target

__all__ = ["PLANS", "verdicts"]

PLANS = ("dp=2", "pp=2,microbatches=2", "tp=2")


def verdicts(target: str, plans: tuple[str, ...] = PLANS) -> dict[str, plait.run.verify.Verdict]:
    """The verdict on a TARGET under each plan."""
    return {plan: plait.verify(load_target(target), plan, steps=3) for plan in plans}
