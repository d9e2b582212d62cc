from __future__ import annotations

import json

import pytest

from plait.cost.table import Row
from plait.cost.validate import _ranks, validate

TEXTS = {
    "source": "lab",
    "accelerator": "NVIDIA H100 SXM5",
    "precision": "bf16",
    "sharding": "fsdp",
    "activation_recompute": "none",
}
NUMBERS = {
    "layers": 8, "hidden": 1024, "ffn_hidden": 4096, "heads": 16, "kv_heads": 16, "vocab": 8192, "seq_len": 1024,
    "n_accelerators": 8, "micro_batch": 1, "global_batch": 32, "dp": 8, "tp": 1, "pp": 1,
}  # fmt: skip


def row(number, texts=(), **numbers):
    values = {**NUMBERS, "step_time_s": 0.1, **numbers}
    return Row(
        number,
        {**TEXTS, "id": f"lab-{number}", **dict(texts)},
        {name: float(value) for name, value in values.items() if value is not None},
    )


def test_rows_are_compared_with_their_measurement():
    """Every row has a prediction and its error in per cent."""
    found = validate([row(1)]).rows[0].to_dict()

    assert found["error_pct"] == pytest.approx(100 * (found["predicted_step_time_s"] / 0.1 - 1))
    assert found["predicted_tokens_per_s_per_accel"] == pytest.approx(32 * 1024 / 8 / found["predicted_step_time_s"])
    assert found["predicted_peak_memory_gib"] > 0
    json.dumps(found, allow_nan=False)


def test_throughput_stands_for_time():
    """Tokens per second and device give the step time where it is not printed."""
    by_rate = validate([row(1, step_time_s=None, tokens_per_s_per_accel=40960)]).rows[0]

    assert by_rate.measured_step_time_s == pytest.approx(32 * 1024 / 8 / 40960)


def test_skipped_rows_are_listed():
    """A row that lacks something appears with the reason and counts against its group."""
    found = validate([row(1), row(2, layers=None), row(3, dp=3)])

    assert [item.skipped for item in found.rows][1] == "layers is not given"
    assert "skipped" in found.rows[2].to_dict()
    assert found.summary()["skipped"] == 2


def test_a_group_mostly_skipped_counts_as_wrong():
    """Predicting only the easy rows of a source does not make it right."""
    group = validate([row(1), *(row(n, dp=3) for n in range(2, 6))]).groups()[0]

    assert group["usable"] == 5
    assert group["median_error_pct"] == 100.0


def test_rows_set_apart_are_predicted_but_not_scored():
    """Stalled runs are shown, not counted; rows for time only are not counted for memory."""
    stalled = row(2, {"apart": "stalled run"}, peak_memory_gib=9)
    timed = row(3, {"apart": "time only: unclear"}, peak_memory_gib=9)
    found = validate([row(1, peak_memory_gib=9), stalled, timed])
    group = found.groups()[0]

    assert (group["rows"], group["count"], group["memory_count"]) == (3, 2, 1)


def test_shape_is_free_of_a_common_factor():
    """What one measured run would calibrate away is not in the shape error."""
    times = [validate([row(n, micro_batch=n)]).rows[0].estimate.step_time_s for n in (1, 2, 4)]
    found = validate([row(n, micro_batch=n, step_time_s=3 * t) for n, t in zip((1, 2, 4), times, strict=True)])

    assert found.groups()[0]["shape_error_pct"] == pytest.approx(0.0, abs=1e-9)
    assert found.groups()[0]["bias_pct"] == pytest.approx(-200 / 3)


def test_ranking_is_over_configurations_of_one_model():
    """Eight configurations with their own predictions as measurement rank perfectly and lose nothing."""
    shapes = [(8, 1), (4, 2), (2, 4), (1, 8)]
    rows = [row(10 * i + m, dp=d, tp=t, micro_batch=m) for i, (d, t) in enumerate(shapes) for m in (1, 2)]
    times = [item.estimate.step_time_s for item in validate(rows).rows]
    again = [row(r.line, dp=r.numbers["dp"], tp=r.numbers["tp"], micro_batch=r.numbers["micro_batch"], step_time_s=t)
             for r, t in zip(rows, times, strict=True)]  # fmt: skip
    summary = validate(again).summary()

    assert summary["sets"] == 1
    assert summary["rank_correlation"] == pytest.approx(1.0)
    assert summary["pick_loss_pct"] == pytest.approx(0.0)


def test_ties_share_their_rank():
    """Equal values have the mean of their ranks."""
    assert _ranks([3.0, 1.0, 3.0]) == [2.5, 1.0, 2.5]
