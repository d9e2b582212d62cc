"""Dollars and joules: price x time, power x time."""

from __future__ import annotations

from plait.schema.cluster import Cluster

__all__ = ["joules", "usd"]

_IDLE = 0.35  # of maximum power, while waiting: general knowledge of data-centre GPUs, 25-45 %


def usd(cluster: Cluster, devices: int, seconds: float) -> float | None:
    """Dollars for `devices` of the cluster for `seconds`; None where a group has no price."""
    total, left = 0.0, devices
    for group in cluster.groups:
        used = min(left, group.count)
        left -= used
        if used and group.usd_per_hour is None:
            return None
        total += used * (group.usd_per_hour or 0.0) * seconds / 3600
    return total


def joules(cluster: Cluster, devices: int, seconds: float, busy: float) -> float | None:
    """Joules of the accelerators alone: maximum power for `busy` seconds of a step, idle power for the rest.

    None where a group's power is not known. Known error: hosts, network and cooling are not counted (add 30 to 60 %).
    """
    total, left = 0.0, devices
    for group in cluster.groups:
        used = min(left, group.count)
        left -= used
        if used and group.device.power_w is None:
            return None
        total += used * (group.device.power_w or 0.0) * (busy + _IDLE * max(0.0, seconds - busy))
    return total
