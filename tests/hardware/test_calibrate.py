from __future__ import annotations

import json

import pytest

from plait.errors import HardwareError
from plait.hardware.calibrate import calibrated, read_runs
from plait.hardware.clusters import named_cluster
from plait.schema import Cluster

CLUSTER = named_cluster("8xH100")


def run_dir(path, compute, shown, measured, cluster=CLUSTER):
    """A run predicted to compute and to exchange for so many seconds, and what it took."""
    path.mkdir()
    predicted = {"step_time_s": compute + shown, "compute": compute, "communication_exposed": shown}
    data = {name: {"predicted": value, "measured": measured, "error_pct": 0.0} for name, value in predicted.items()}
    data["peak_memory"] = {"predicted": None, "measured": 3.0, "error_pct": None}
    (path / "prediction.json").write_text(json.dumps(data), encoding="utf-8")
    (path / "cluster.json").write_text(cluster.to_json(), encoding="utf-8")
    return path


def test_runs_correct_the_cluster(tmp_path):
    """Compute that takes half as long again and collectives twice as long are told apart by runs that mix them."""
    cases = [(1.0, 0.1), (2.0, 0.2), (0.5, 1.0), (1.0, 1.0)]
    runs = read_runs([run_dir(tmp_path / str(i), c, x, 1.5 * c + 2 * x) for i, (c, x) in enumerate(cases)])

    found, changes = calibrated(CLUSTER, runs)

    assert changes["scale"] == pytest.approx(1 / 1.5, rel=0.03)
    assert changes["node"] == pytest.approx(1 / 2, rel=0.06)
    assert changes["error_before_pct"] > 30
    assert changes["error_after_pct"] < 1.5
    assert found.groups[0].device.efficiency["scale"] == changes["scale"]


def test_the_same_runs_twice_change_nothing_more(tmp_path):
    """Factors are absolute: the error before is then the error after of the first time."""
    runs = read_runs([run_dir(tmp_path / "a", 1.0, 0.5, 2.0), run_dir(tmp_path / "b", 1.0, 0.1, 1.7)])
    once, first = calibrated(CLUSTER, runs)
    twice, second = calibrated(once, runs)

    assert twice == once
    assert second["error_before_pct"] == pytest.approx(first["error_after_pct"])


def test_runs_predicted_after_a_calibration_count_from_there(tmp_path):
    """A run on the corrected cluster that was predicted right leaves it as it is."""
    corrected, _ = calibrated(CLUSTER, read_runs([run_dir(tmp_path / "a", 1.0, 0.0, 1.5)]))
    again, changes = calibrated(corrected, read_runs([run_dir(tmp_path / "b", 1.5, 0.0, 1.5, corrected)]))

    assert changes["scale"] == pytest.approx(corrected.groups[0].device.efficiency["scale"])
    assert changes["error_before_pct"] == pytest.approx(0.0, abs=1e-6)
    assert again == Cluster.from_json(again.to_json())


def test_one_kind_of_run_moves_both_factors(tmp_path):
    """Runs that cannot tell compute from communication correct both alike."""
    _, changes = calibrated(CLUSTER, read_runs([run_dir(tmp_path / "a", 1.0, 1.0, 4.0)]))

    assert changes["scale"] == pytest.approx(0.5, rel=0.01)
    assert changes["node"] == pytest.approx(0.5, rel=0.01)


def test_a_folder_without_comparison_is_refused(tmp_path):
    """The hint says which folders have one."""
    with pytest.raises(HardwareError, match=r"prediction.json: FileNotFoundError"):
        read_runs([tmp_path])


@pytest.mark.parametrize("text", ["[]", "{}", '{"step_time_s": 3}', "nonsense"])
def test_a_broken_comparison_is_refused(tmp_path, text):
    """What a run left must be readable."""
    path = run_dir(tmp_path / "a", 1.0, 0.0, 1.5)
    (path / "prediction.json").write_text(text, encoding="utf-8")
    with pytest.raises(HardwareError, match=r"prediction.json"):
        read_runs([path])


@pytest.mark.parametrize("measured", [0.0, -1.0, float("nan"), float("inf")])
def test_a_failed_measurement_is_refused(tmp_path, measured):
    """A step that took no time was not measured."""
    with pytest.raises(HardwareError, match=r"prediction.json: ValueError"):
        read_runs([run_dir(tmp_path / "a", 1.0, 0.0, measured)])


def test_another_clusters_run_is_refused(tmp_path):
    """Runs on other devices say nothing of these."""
    runs = read_runs([run_dir(tmp_path / "a", 1.0, 0.0, 1.5, named_cluster("8xA100"))])
    with pytest.raises(HardwareError, match="this run was on NVIDIA A100"):
        calibrated(CLUSTER, runs)


def test_an_absurd_run_is_refused(tmp_path):
    """A run a hundred times slower than predicted is no calibration."""
    with pytest.raises(HardwareError, match="measured 100 s"):
        calibrated(CLUSTER, read_runs([run_dir(tmp_path / "a", 1.0, 0.0, 100.0)]))


def test_the_verb_says_the_error_before_and_after(probe, tmp_path, monkeypatch, capsys):
    """Several folders after one option; the kept probe takes the factors, and the same runs again change nothing."""
    from plait.cli.main import run
    from plait.hardware.local import local_cluster
    from plait.hardware.probe import load_probe, save_probe

    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("plait.hardware.probe.usable_cores", lambda: 2)
    save_probe(probe)
    folders = [
        str(run_dir(tmp_path / name, 1.0, 0.2, took, local_cluster(4))) for name, took in (("a", 2.0), ("b", 2.4))
    ]

    assert run(["hardware", "probe", "--calibrate", *folders]) == 0
    first = capsys.readouterr().out
    assert "45.0 % before, 9.1 % after" in first
    assert load_probe().factors["scale"] == pytest.approx(1.2 / (2.0 * 2.4) ** 0.5, rel=1e-3)
    assert run(["hardware", "probe", "--calibrate", *folders]) == 0
    assert "9.1 % before, 9.1 % after" in capsys.readouterr().out
    assert run(["hardware", "probe", *folders]) == 2
