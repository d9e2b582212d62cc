"""What it costs to be interrupted: expected hours of a run on spot machines."""

from __future__ import annotations

import math

__all__ = ["expected_hours"]


def expected_hours(
    hours: float, *, instances: int, per_day: float, checkpoint_minutes: float, restart_minutes: float
) -> float:
    """Expected hours until `hours` of work are done; infinite where interruptions come faster than progress.

    Any instance's interruption stops the run. Each loses half a checkpoint interval and one restart:

        T = hours / (1 - rate x (interval / 2 + restart)),   rate = instances x per_day / 24

    First order (interruptions that strike a restart are not counted twice), independent instances, replacements at
    once, checkpoints that cost nothing. Source of the half interval: Young (1974), CACM 17(9).
    """
    lost = instances * per_day / 24 * (checkpoint_minutes / 2 + restart_minutes) / 60
    return hours / (1 - lost) if lost < 1 else math.inf
