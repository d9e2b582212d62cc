from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cost.comms import Hop, all_gather, all_reduce, all_to_all, hops, send
from plait.schema import Cluster, Device, Group, Link

CLUSTER = Cluster(
    name="lab",
    groups=(Group(device=Device(name="d", peak_flops={}), count=64),),
    links=(
        Link(level="node", size=8, bandwidth=300e9, latency=5e-6),
        Link(level="site", size=64, bandwidth=25e9, latency=1e-5),
    ),
)
COLLECTIVES = [all_gather, all_reduce, all_to_all]


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_one_rank_pays_nothing(collective):
    """Alone, a rank already holds everything."""
    assert collective(1e9, hops(CLUSTER, size=1, stride=1)) == 0.0


def test_a_group_in_a_node_stays_there():
    """Eight neighbours use the node's link only; eight ranks a node apart only the network."""
    assert [hop.members for hop in hops(CLUSTER, size=8, stride=1)] == [8]
    assert hops(CLUSTER, size=8, stride=8)[0].bandwidth == 25e9


def test_a_node_leaves_by_all_its_adapters():
    """A ring over whole nodes crosses between them at eight adapters' bandwidth."""
    large = 1e12
    whole = all_gather(large, hops(CLUSTER, size=64, stride=1))

    assert whole == pytest.approx(63 / 64 * large / 200e9, rel=1e-3)


def test_all_reduce_is_two_all_gathers_at_most():
    """A ring reduces and then gathers; a tree may be quicker for short messages, never slower."""
    group = hops(CLUSTER, size=64, stride=1)

    assert all_reduce(1e12, group) == pytest.approx(2 * all_gather(1e12, group))
    assert all_reduce(8.0, group) < 2 * all_gather(8.0, group)


@settings(deadline=None)
@given(st.sampled_from(COLLECTIVES), st.floats(1, 1e12), st.floats(1.0, 100.0))
def test_more_bandwidth_is_never_slower(collective, size, factor):
    """A better network does not cost time."""
    slow = (Hop(8, 1e9, 1e-6), Hop(64, 1e8, 1e-5))
    fast = tuple(Hop(hop.members, hop.bandwidth * factor, hop.latency) for hop in slow)

    assert collective(size, fast) <= collective(size, slow)


@settings(deadline=None)
@given(st.sampled_from(COLLECTIVES), st.floats(1, 1e12), st.floats(1.0, 10.0))
def test_more_bytes_are_never_faster(collective, size, factor):
    """A longer message takes no less."""
    group = hops(CLUSTER, size=64, stride=1)

    assert collective(size * factor, group) >= collective(size, group)


def test_a_send_pays_the_slowest_hop():
    """Of a pipeline's neighbours the two in different nodes decide."""
    assert send(25e9, CLUSTER, stride=8, count=4) == pytest.approx(1.0, rel=1e-3)
    assert send(300e9, CLUSTER, stride=2, count=4) == pytest.approx(1.0, rel=1e-3)
    assert send(1e9, CLUSTER, stride=1, count=1) == 0.0


def test_messages_pay_latency_each():
    """Two messages of half the size take one latency more."""
    group = hops(CLUSTER, size=8, stride=1)

    assert all_gather(1e6, group, 2) - all_gather(1e6, group) == pytest.approx(7 * 5e-6)


def test_efficiency_scales_levels():
    """A link that reaches half its bandwidth takes twice as long."""
    half = hops(CLUSTER, size=8, stride=1, efficiency={"node": 0.5}, latency={"node": 0.0})

    assert math.isclose(all_gather(8e9, half), 7e9 / 150e9)
