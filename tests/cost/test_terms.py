"""Overlap, optimizer, money: a few lines each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cost.money import joules, usd
from plait.cost.optimizer import accumulate_seconds, optimizer_seconds
from plait.cost.overlap import hide
from plait.hardware.clusters import named_cluster
from plait.schema import Cluster, Device, Group


@settings(deadline=None)
@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1), st.floats(0, 1))
def test_hiding_takes_nothing_away(seconds, beside, fraction, slowdown):
    """What is hidden and what shows are all of it; more compute hides no less."""
    shown = hide(seconds, beside=beside, fraction=fraction, slowdown=0.0)
    slowed = hide(seconds, beside=beside, fraction=fraction, slowdown=slowdown)

    assert shown.exposed + shown.hidden == pytest.approx(seconds)
    assert slowed.exposed >= shown.exposed
    assert shown.hidden <= beside


def test_a_tail_never_hides():
    """The last bucket has no backward left beside it."""
    assert hide(2.0, beside=100.0, fraction=1.0, slowdown=0.0, tail=0.5).exposed == 0.5


def test_the_optimizer_moves_its_bytes():
    """A billion parameters with 12 bytes of state at 1 TB/s: 30 bytes each."""
    assert optimizer_seconds(1e9, state_bytes=12, weight_bytes=2, bandwidth=1e12) == pytest.approx(0.030)
    assert accumulate_seconds(1e9, new_bytes=2, kept_bytes=4, bandwidth=1e12) == pytest.approx(0.010)


def test_money_is_price_times_time():
    """Eight devices for an hour cost eight hourly prices."""
    cluster = named_cluster("8xH100")

    assert usd(cluster, 8, 3600) == pytest.approx(8 * cluster.groups[0].usd_per_hour)


def test_what_has_no_price_costs_nothing_known():
    """An unpriced device's bill is unknown, not zero; so is the energy of one without a power figure."""
    cluster = Cluster(name="x", groups=(Group(device=Device(name="d", peak_flops={}), count=1),), links=())

    assert usd(cluster, 1, 10) is None
    assert joules(cluster, 1, 10, 5) is None


def test_energy_counts_idle_power():
    """A waiting device draws a part of its power."""
    cluster = named_cluster("1xH100")

    assert 700 * 10 > joules(cluster, 1, 10, 5) > 700 * 5
