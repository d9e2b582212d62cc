from __future__ import annotations

import json

import pytest

from plait.errors import HardwareError
from plait.hardware.calibrate import calibrated, read_runs
from plait.hardware.clusters import named_cluster


def run_dir(path, predicted, measured):
    path.mkdir()
    data = {
        name: {"predicted": predicted, "measured": measured, "error_pct": 0.0} for name in ("step_time_s", "compute")
    } | {"peak_memory": {"predicted": None, "measured": 3.0, "error_pct": None}}
    (path / "prediction.json").write_text(json.dumps(data), encoding="utf-8")
    return path


def test_runs_correct_the_cluster(tmp_path):
    """Runs that took half as long again leave no error once the cluster knows."""
    runs = read_runs([run_dir(tmp_path / "a", 1.0, 1.5), run_dir(tmp_path / "b", 2.0, 3.0)])

    found, changes = calibrated(named_cluster("8xH100"), runs)

    assert found.groups[0].device.efficiency["scale"] == pytest.approx(1 / 1.5)
    assert changes["error_before_pct"] == pytest.approx(100 / 3)
    assert changes["error_after_pct"] == pytest.approx(0.0, abs=1e-9)


def test_a_folder_without_comparison_is_refused(tmp_path):
    """The hint says which folders have one."""
    with pytest.raises(HardwareError, match=r"prediction.json: FileNotFoundError"):
        read_runs([tmp_path])
