"""Tables that nobody has seen: each row is predicted or skipped with a reason, and each error names its place."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.cost.table import COLUMNS, read_table
from plait.cost.validate import validate
from plait.errors import TableError

ROWS = [
    {"id": "lab-1", "source": "lab, Megatron-LM", "model_name": "Llama 8B", "params_b": "8.03", "layers": "32", "hidden": "4096",
     "ffn_hidden": "14336", "heads": "32", "kv_heads": "8", "vocab": "128256", "seq_len": "4096", "accelerator": "NVIDIA H100 SXM5",
     "n_accelerators": "16", "nodes_gpus_per_node": "8", "precision": "bf16", "micro_batch": "1", "global_batch": "32", "dp": "4",
     "tp": "2", "pp": "2", "sharding": "zero1", "activation_recompute": "full", "step_time_s": "2.5", "peak_memory_gib": "50"},
    {"id": "lab-2", "source": "lab", "model_name": "Mixtral", "params_b": "46.7", "layers": "8", "hidden": "4096", "ffn_hidden": "14336",
     "heads": "32", "kv_heads": "8", "seq_len": "2048", "moe_experts": "8", "moe_topk": "2", "accelerator": "AMD Instinct MI250X",
     "n_accelerators": "8", "precision": "bf16", "global_batch": "64", "dp": "8", "tp": "1", "pp": "1", "ep": "8", "sharding": "fsdp",
     "mfu_pct": "31"},
    {"id": "other-1", "source": "other", "model_name": "GPT 1.3B", "layers": "24", "hidden": "2048", "heads": "16", "seq_len": "1024",
     "accelerator": "Google TPU v4", "n_accelerators": "8", "global_batch": "64", "dp": "8", "tokens_per_s_per_accel": "9000",
     "apart": "time only: memory of another run"},
]  # fmt: skip
ODD = st.sampled_from(
    [
        "",
        " ",
        "0",
        "-1",
        "nan",
        "1e400",
        "many",
        "3.5",
        "1e9",
        "7",
        "64",
        "none",
        "fp4",
        "V100",
        "Gaudi2",
        "WSE-3",
        '\u00e9,"x',
    ]
)
CHANGE = st.tuples(st.integers(0, 2), st.sampled_from(COLUMNS), ODD)


def written(folder, columns, rows, encoding="utf-8"):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / "table.csv"
    path.write_text(text.getvalue(), encoding=encoding)
    return path


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CHANGE, max_size=4), st.sets(st.sampled_from(COLUMNS), max_size=12))
def test_no_row_is_lost(tmp_path, changes, dropped):
    """Whatever columns are missing and whatever is written in a few cells."""
    rows = [dict(row) for row in ROWS]
    for index, column, value in changes:
        rows[index][column] = value
    try:
        table = read_table(written(tmp_path, [c for c in COLUMNS if c not in dropped], rows))
    except TableError as problem:
        told = problem
        assert "table.csv" in told.message
        assert told.exit_status == 2
        return

    found = validate(table)
    shown = json.loads(json.dumps([row.to_dict() for row in found.rows], allow_nan=False))

    assert len(shown) == 3
    for row in shown:
        assert row["predicted_step_time_s"] > 0 if "predicted_step_time_s" in row else row["skipped"]
    json.dumps([found.groups(), found.summary()], allow_nan=False)


@pytest.mark.parametrize(
    "part",
    [
        "NVIDIA A100 SXM4 40GB",
        "V100",
        "B200",
        "MI250X",
        "TPU-v4",
        "TPU-v5p",
        "Gaudi2",
        "Ascend-910B",
        "Trainium2",
        "H200",
    ],
)
def test_accelerators_of_the_catalogue_are_predicted(tmp_path, part):
    """A row on any part that trains, with a time and no memory."""
    row = {**ROWS[2], "accelerator": part, "precision": "fp16" if part == "V100" else "bf16"}
    (found,) = validate(read_table(written(tmp_path, [c for c in COLUMNS if c != "peak_memory_gib"], [row]))).rows

    assert found.to_dict()["predicted_tokens_per_s_per_accel"] > 0
    assert found.to_dict()["error_pct"] is not None


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("accelerator", "accelerator is not given"),
        ("layers", "layers is not given"),
        ("global_batch", "global_batch is not given"),
    ],
)
def test_a_row_that_lacks_something_says_what(tmp_path, column, reason):
    """An empty cell is a skipped row with its reason."""
    (found,) = validate(read_table(written(tmp_path, COLUMNS, [{**ROWS[0], column: ""}]))).rows

    assert found.to_dict()["skipped"] == reason


def test_a_spreadsheets_byte_order_mark_is_no_part_of_a_name(tmp_path):
    """The first column is found all the same."""
    (row,) = read_table(written(tmp_path, COLUMNS, ROWS[:1], encoding="utf-8-sig"))

    assert row.id == "lab-1"
