from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from plait.errors import HardwareError
from plait.hardware.local import cluster_of
from plait.hardware.probe import _figure, load_probe, save_probe
from plait.schema import Cluster


def test_processes_share_the_cores(probe):
    """Four processes on two cores run at what a core gave four of them."""
    found = cluster_of(probe, 4)

    assert found.devices == 4
    assert found.shared_cores == 2
    assert found.groups[0].device.peak("fp32") == pytest.approx(5e10)
    assert found.groups[0].device.peak("bf16") == pytest.approx(2e11)
    assert found.groups[0].device.memory_bytes == 2e9


def test_a_collective_costs_a_core_and_a_wait(probe):
    """Of five milliseconds, four processes on two cores need two milliseconds of a core each: four together, one to wait."""
    timings = cluster_of(probe, 4).links[0].timings
    large = next(t for t in timings if (t.collective, t.ranks, t.nbytes) == ("all_reduce", 4, 1 << 20))

    assert large.core == 2e-3
    assert large.wait == pytest.approx(1e-3)


def test_matmul_and_its_traffic_are_told_apart(probe):
    """Two matmuls of different shape give a rate and a bandwidth."""
    device = cluster_of(probe, 2).groups[0].device

    assert device.peak("fp32") == pytest.approx(5.5e10)
    assert device.need("memory_bandwidth") / device.efficiency["traffic"] == pytest.approx(5.5e9)


@pytest.mark.parametrize(("devices", "measured"), [(3, 4), (8, 4), (2, 2)])
def test_the_nearest_measurement_serves(probe, devices, measured):
    """Where that many processes were not measured, the cluster says which were; crowded ones serve crowded ones."""
    found = cluster_of(probe, devices)

    assert found.groups[0].device.source.endswith(f"{measured} processes at once")
    assert bool([note for note in found.notes if "measured with" in note]) == (devices != measured)


def test_one_process_has_all_threads(probe):
    """Alone, a process uses every core."""
    assert cluster_of(probe, 1).groups[0].device.peak("fp32") == pytest.approx(1e11)


def test_a_measured_cluster_is_a_file(probe, tmp_path):
    """What the probe gave is written and read back equal, collectives included."""
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster_of(probe, 4).to_dict()), encoding="utf-8")

    assert Cluster.load(str(path)) == cluster_of(probe, 4)


def test_a_collective_that_was_not_measured_is_refused(probe):
    """A probe without collectives makes no cluster of several processes."""
    with pytest.raises(HardwareError, match=r"no figure all_reduce|measured no collectives"):
        cluster_of(replace(probe, figures=tuple(f for f in probe.figures if "ranks" not in f.name)), 2)


def test_a_cluster_needs_a_probe(tmp_path, monkeypatch):
    """What was not measured is not guessed."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    with pytest.raises(HardwareError, match="has not been measured yet"):
        Cluster.local(devices=4)


def test_a_kept_probe_is_found(probe, tmp_path, monkeypatch):
    """The probe is kept and read back equal; one of another number of cores is not this computer's."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    monkeypatch.setattr("plait.hardware.probe.usable_cores", lambda: 2)
    save_probe(probe)

    assert load_probe() == probe
    assert Cluster.local(devices=2).devices == 2
    monkeypatch.setattr("plait.hardware.probe.usable_cores", lambda: 3)
    assert load_probe() is None


def test_a_failed_measurement_is_not_a_zero():
    """A clock that did not move measured nothing."""
    with pytest.raises(HardwareError, match="the clock is too coarse"):
        _figure("matmul", [0.0, 0.0, 0.0], "FLOP/s", 1e9)


def test_a_missing_figure_is_named(probe):
    """A probe that lacks a figure says which."""
    with pytest.raises(HardwareError, match="no figure copy/threads=64"):
        probe.value("copy/threads=64")
