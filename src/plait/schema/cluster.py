"""The machine, as facts: devices, the network between them by level, and what they cost an hour."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from plait.errors import HardwareError
from plait.schema.records import Record
from plait.schema.timing import Timing

__all__ = ["LEVELS", "Cluster", "Device", "Group", "Link"]

LEVELS = ("device", "node", "rack", "site")

_MOST_DEVICES = 10**7
_ABSURD = {"memory_bytes": 2**50, "memory_bandwidth": 1e18, "power_w": 1e6, "bandwidth": 1e16, "peak_flops": 1e21}


def _check_figure(where: str, name: str, value: float | None, *, zero: bool = False) -> None:
    if value is None:
        return
    if math.isnan(value) or value < 0 or (value == 0 and not zero) or value > _ABSURD.get(name, 1e24):
        raise HardwareError(
            f"{where}: {name}={value:g} is not a believable figure",
            hint="give it in SI units (bytes, bytes/s, FLOP/s, seconds, watts), or leave it out when it is not known",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Device(Record):
    """One accelerator. A figure that no source states is None, never zero."""

    name: str
    peak_flops: dict[str, float]
    """Dense peak FLOP/s by precision: fp32, tf32, fp16, bf16, fp8, fp4, int8."""
    memory_bytes: float | None = None
    memory_bandwidth: float | None = None
    """Bytes per second."""
    power_w: float | None = None
    family: str = ""
    category: str = "gpu"
    programmability: str = "semi-dedicated"
    """dedicated, semi-dedicated or general."""
    trains: bool = True
    torch_device: str = ""
    collective_library: str = ""
    efficiency: dict[str, float] = field(default_factory=dict)
    """Measured or fitted parameters (names in `plait.cost.calibration`) that replace the family's."""
    verified: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        for precision, value in self.peak_flops.items():
            _check_figure(f"device {self.name}, {precision}", "peak_flops", value)
        for name in ("memory_bytes", "memory_bandwidth", "power_w"):
            _check_figure(f"device {self.name}", name, getattr(self, name))

    def peak(self, precision: str) -> float:
        """Peak FLOP/s at `precision`.

        fp16 and bf16 stand for one another, where only one is stated: every part so far runs them at
        the same rate. Nothing else is substituted.

        Raises:
            HardwareError: no source states it.
        """
        for name in {"fp16": ("fp16", "bf16"), "bf16": ("bf16", "fp16")}.get(precision, (precision,)):
            if name in self.peak_flops:
                return self.peak_flops[name]
        known = ", ".join(self.peak_flops) or "none"
        raise HardwareError(
            f"{self.name}: its {precision} rate is not known, and this plan needs it",
            hint=f"rates that are known: {known}; measure it with `plait hardware probe`, or write it in a cluster file",
        )

    def need(self, figure: str) -> float:
        """The figure called `figure` (memory_bytes, memory_bandwidth, power_w).

        Raises:
            HardwareError: no source states it.
        """
        value = getattr(self, figure)
        if value is None:
            raise HardwareError(
                f"{self.name}: its {figure} is not known, and this plan needs it",
                hint="measure it with `plait hardware probe`, or write it in a cluster file",
            )
        return float(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link(Record):
    """One level of the network: what joins `size` devices."""

    level: str
    """device, node, rack or site: the group of devices that this link joins lies within one of these."""
    size: int
    """Devices in one such group."""
    bandwidth: float
    """Bytes per second for each device, one direction."""
    latency: float
    """Seconds for an empty message."""
    name: str = ""
    source: str = ""
    timings: tuple[Timing, ...] = ()
    """Collectives as they were measured on it; where there are any they count, not `bandwidth` and `latency`."""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise HardwareError(f"link level {self.level!r} is not one of {', '.join(LEVELS)}")
        if self.size < 1:
            raise HardwareError(f"link {self.level}: size={self.size} must be at least 1")
        _check_figure(f"link {self.level}", "bandwidth", self.bandwidth)
        _check_figure(f"link {self.level}", "latency", self.latency, zero=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group(Record):
    """Devices of one kind."""

    device: Device
    count: int
    usd_per_hour: float | None = None
    """Of one device; None: no offer is known."""
    price_as_of: str = ""
    price_source: str = ""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise HardwareError(f"group {self.device.name}: count={self.count} must be at least 1")
        if self.count > _MOST_DEVICES:
            raise HardwareError(
                f"group {self.device.name}: count={self.count} is not a believable number of devices",
                hint=f"at most {_MOST_DEVICES:,} are planned for",
            )
        _check_figure(f"group {self.device.name}", "usd_per_hour", self.usd_per_hour, zero=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster(Record):
    """Devices and the links between them, smallest level first."""

    name: str
    groups: tuple[Group, ...]
    links: tuple[Link, ...]
    shared_cores: int | None = None
    """Cores that all devices of a node share, where a device is a process on a CPU; None: each has its own."""
    notes: tuple[str, ...] = ()
    """What was assumed, for people to read."""

    def __post_init__(self) -> None:
        if not self.groups:
            raise HardwareError(f"cluster {self.name}: it has no devices")
        for group in self.groups:
            other = next(g.device for g in self.groups if g.device.name == group.device.name)
            if other != group.device:
                raise HardwareError(
                    f"cluster {self.name}: two groups are called {other.name} but have different figures",
                    hint="give each kind of device its own name",
                )
        sizes = [link.size for link in self.links]
        if sizes != sorted(sizes):
            raise HardwareError(
                f"cluster {self.name}: link sizes {sizes} must rise",
                hint="list the links from the smallest group of devices (node) to the largest (site)",
            )
        order = [LEVELS.index(link.level) for link in self.links]
        if order != sorted(set(order)):
            raise HardwareError(
                f"cluster {self.name}: link levels {[link.level for link in self.links]} must rise from device to site"
            )
        if self.devices > 1 and (not sizes or sizes[-1] < self.devices):
            raise HardwareError(
                f"cluster {self.name}: its links join {sizes[-1] if sizes else 1} devices, it has {self.devices}",
                hint=f"give the last link size: {self.devices}",
            )

    @property
    def devices(self) -> int:
        """Devices in all groups."""
        return sum(group.count for group in self.groups)

    @property
    def node_size(self) -> int:
        """Devices joined by the node's own link (1 where there is none)."""
        return next((link.size for link in self.links if link.level == "node"), 1)

    @property
    def is_uniform(self) -> bool:
        """Whether all devices are of one kind."""
        return all(group.device == self.groups[0].device for group in self.groups)

    def device_of(self, rank: int) -> Device:
        """The device that `rank` runs on, groups in order."""
        for group in self.groups:
            if rank < group.count:
                return group.device
            rank -= group.count
        raise IndexError(rank)

    def unverified(self) -> tuple[str, ...]:
        """Names of devices whose figures nobody has checked against a source."""
        return tuple(dict.fromkeys(g.device.name for g in self.groups if not g.device.verified))

    @classmethod
    def local(cls, *, devices: int) -> Cluster:
        """This computer as `devices` processes, from the cached probe.

        Raises:
            HardwareError: it has not been probed yet.
        """
        from plait.hardware.local import local_cluster

        return local_cluster(devices)

    @classmethod
    def load(cls, cluster: Cluster | str) -> Cluster:
        """A cluster from itself, a name such as `8xH100-SXM`, or a YAML file's path.

        Raises:
            HardwareError: the name or file is not understood.
        """
        if isinstance(cluster, Cluster):
            return cluster
        from plait.hardware.clusters import load_cluster

        return load_cluster(cluster)
