from __future__ import annotations

import math

import pytest

from plait.errors import HardwareError
from plait.schema import Cluster, Device, Group, Link

DEVICE = Device(name="part", peak_flops={"fp32": 1e12, "bf16": 4e12}, memory_bytes=16e9, memory_bandwidth=1e12)


def cluster(**changes):
    values = {
        "name": "lab",
        "groups": (Group(device=DEVICE, count=16),),
        "links": (
            Link(level="node", size=8, bandwidth=3e11, latency=5e-6),
            Link(level="site", size=16, bandwidth=2e10, latency=1e-5),
        ),
    }
    return Cluster(**{**values, **changes})


def test_comes_back_equal():
    """A cluster written as JSON is the same when it is read."""
    whole = cluster(notes=("a note",), shared_cores=2)

    assert Cluster.from_json(whole.to_json()) == whole


def test_fp16_stands_for_bf16():
    """Of the two half precisions, one stated rate stands for both."""
    assert DEVICE.peak("fp16") == 4e12


def test_a_missing_rate_is_refused_by_name():
    """A rate that no source states is not invented."""
    with pytest.raises(HardwareError, match="part: its fp8 rate is not known") as problem:
        DEVICE.peak("fp8")
    assert "fp32, bf16" in problem.value.hint


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, 1e30])
def test_absurd_figures_are_refused(value):
    """No device has such a memory."""
    with pytest.raises(HardwareError, match=r"memory_bytes=.* is not a believable figure"):
        Device(name="part", peak_flops={}, memory_bytes=value)


def test_links_must_rise():
    """A node is not larger than its site."""
    with pytest.raises(HardwareError, match=r"link sizes \[16, 8\] must rise"):
        cluster(links=tuple(reversed(cluster().links)))


def test_links_must_join_all_devices():
    """Devices that nothing joins cannot work together."""
    with pytest.raises(HardwareError, match="its links join 8 devices, it has 16"):
        cluster(links=cluster().links[:1])


def test_ranks_fall_on_groups_in_order():
    """In a cluster of two kinds the first ranks are the first kind's."""
    other = Device(name="other", peak_flops={"fp32": 2e12})
    mixed = cluster(groups=(Group(device=DEVICE, count=8), Group(device=other, count=8)))

    assert (mixed.device_of(7).name, mixed.device_of(8).name) == ("part", "other")
    assert not mixed.is_uniform
