from __future__ import annotations

import pytest

from plait.errors import HardwareError
from plait.hardware.local import cluster_of
from plait.hardware.probe import Measured, Probe, _figure, load_probe, save_probe
from plait.schema import Cluster


def figure(name, value, unit="FLOP/s"):
    return Measured(name=name, value=value, unit=unit, spread=0.1, repeats=5)


PROBE = Probe(
    host="here", processor="test", cores=2, memory_bytes=8e9, backend="gloo", torch_version="2", date="2026-01-01",
    seconds=1.0,
    figures=(
        figure("matmul/fp32/512/threads=1", 5e10), figure("matmul/fp32/1024/threads=1", 6e10),
        figure("matmul/fp32/1024/threads=2", 1e11), figure("matmul/bf16/512/threads=1", 2e11),
        figure("copy/threads=1", 1e10, "B/s"), figure("copy/threads=2", 1.5e10, "B/s"),
        figure("add/threads=1", 2e10, "B/s"), figure("add/threads=2", 3e10, "B/s"),
        figure("operator/threads=1", 1e-6, "s"), figure("operator/threads=2", 2e-6, "s"),
        figure("all_reduce/ranks=2/1024", 1e-4, "s"), figure("all_reduce/ranks=2/8388608", 1e-2, "s"),
    ),
)  # fmt: skip


def test_processes_share_the_cores():
    """Four processes on two cores are together no faster than the two."""
    found = cluster_of(PROBE, 4)

    assert found.devices == 4
    assert found.shared_cores == 2
    assert found.groups[0].device.peak("fp32") == pytest.approx(5e10)
    assert found.groups[0].device.memory_bytes == 2e9


def test_one_process_has_all_threads():
    """Alone, a process uses every core."""
    assert cluster_of(PROBE, 1).groups[0].device.peak("fp32") == pytest.approx(1e11)


def test_a_cluster_needs_a_probe(tmp_path, monkeypatch):
    """What was not measured is not guessed."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    with pytest.raises(HardwareError, match="has not been measured yet"):
        Cluster.local(devices=4)


def test_a_kept_probe_is_found(tmp_path, monkeypatch):
    """The probe is kept and read back equal; one of another number of cores is not this computer's."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    monkeypatch.setattr("plait.hardware.probe._cores", lambda: 2)
    save_probe(PROBE)

    assert load_probe() == PROBE
    assert Cluster.local(devices=2).devices == 2
    monkeypatch.setattr("plait.hardware.probe._cores", lambda: 3)
    assert load_probe() is None


def test_a_failed_measurement_is_not_a_zero():
    """A clock that did not move measured nothing."""
    with pytest.raises(HardwareError, match="the clock is too coarse"):
        _figure("matmul", [0.0, 0.0, 0.0], "FLOP/s", 1e9)


def test_a_missing_figure_is_named():
    """A probe that lacks a figure says which."""
    with pytest.raises(HardwareError, match="no figure copy/threads=64"):
        PROBE.value("copy/threads=64")
