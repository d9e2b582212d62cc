"""plan, estimate, validate and hardware: what they print, and how mistakes read."""

from __future__ import annotations

import json

import pytest
import yaml

from plait.cli.main import run
from plait.cost.architecture import Architecture, build_graph
from plait.schema import Plan

GRAPH = build_graph(
    Architecture(
        name="gpt", layers=4, hidden=512, ffn_hidden=2048, heads=8, kv_heads=8, head_dim=64, vocab=4096, seq_len=256
    )
)


@pytest.fixture(autouse=True)
def captured(monkeypatch, tmp_path):
    """A target's graph without torch; caches of this test's own."""
    monkeypatch.setattr("plait.capture.graphs.graph_of", lambda target: (GRAPH, 16))
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))


def printed(capsys, *arguments):
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_estimate_prints_what_the_design_fixes(capsys):
    """The fields that scripts rely on are there."""
    found = printed(capsys, "estimate", "t.py:job", "--cluster", "8xH100", "--plan", "fsdp=8,precision=bf16")

    assert set(found) >= {
        "step_time_s",
        "tokens_per_s",
        "mfu",
        "peak_memory_gib",
        "peak_memory_gib_by_rank",
        "breakdown",
        "fits",
    }
    assert len(found["peak_memory_gib_by_rank"]) == 8
    assert found["batch"] == 16


def test_estimate_says_it_in_words(capsys):
    """For a person: the parts of the step and of memory."""
    assert (
        run(["estimate", "t.py:job", "--cluster", "8xH100", "--plan", "dp=4,pp=2,precision=bf16", "--timeline", "2"])
        == 0
    )
    out = capsys.readouterr().out
    assert "bubble" in out
    assert "activations" in out
    assert "rank   1 forward" in out


def test_plan_writes_a_file_that_runs(capsys, tmp_path):
    """The best plan is complete, and read back equal."""
    path = tmp_path / "plan.yaml"
    found = printed(capsys, "plan", "t.py:job", "--cluster", "8xH100", "--top", "2", "-o", str(path))

    assert len(found["plans"]) == 2
    assert set(found["plans"][0]) >= {"spec", "plan", "estimate"}
    assert {"pareto", "refused"} <= set(found)
    assert Plan.load(path) == Plan.from_dict(found["plans"][0]["plan"])
    assert yaml.safe_load(path.read_text())["cluster"] == "8xH100"


def test_plan_explains_itself(capsys):
    """What binds, and what a node more or less changes."""
    assert run(["plan", "t.py:job", "--cluster", "8xH100", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "binds: " in out
    assert "with 7 devices" in out


def test_a_runnable_plan_can_be_run(capsys):
    """Nothing that plait cannot execute yet is among them."""
    found = printed(capsys, "plan", "t.py:job", "--cluster", "8xH100", "--runnable")

    assert all("not_executable" not in entry for entry in found["plans"])


def test_hardware_lists_and_shows(capsys):
    """Parts, one part with its offers, and clusters with their links."""
    assert run(["hardware", "list", "TPU"]) == 0
    assert "Google TPU v5p" in capsys.readouterr().out
    part = printed(capsys, "hardware", "show", "H100-SXM")
    assert part["accelerator"]["device"]["name"] == "NVIDIA H100 SXM5"
    assert part["offers"]
    assert printed(capsys, "hardware", "show", "16xZionEX")["cluster"]["links"]
    assert printed(capsys, "hardware", "refresh", "--ages")["offers"] > 900


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hardware", "show", "H1000"], "accelerator 'H1000' is not in the catalogue"),
        (["estimate", "t.py:job", "--cluster", "8xH1000", "--plan", "dp=8"], "is not in the catalogue"),
        (["estimate", "t.py:job", "--cluster", "8xH100", "--plan", "dp=16"], "needs 16 devices"),
        (["plan", "t.py:job", "--cluster", "nowhere.yaml"], "No such file"),
        (["plan", "t.py:job", "--cluster", "8xH100", "-o", "/nowhere/plan.yaml"], "plan file /nowhere/plan.yaml"),
        (["validate", "nowhere.csv"], "table nowhere.csv"),
    ],
)
def test_mistakes_are_told_in_a_line(capsys, arguments, message):
    """Status 2, the first line says what and where, no traceback."""
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[0]
    assert "Traceback" not in captured.err


TABLE = """id,accelerator,layers,hidden,ffn_hidden,heads,seq_len,n_accelerators,global_batch,micro_batch,dp,precision,step_time_s
lab-1,NVIDIA H100 SXM5,8,1024,4096,16,1024,8,32,1,8,bf16,0.1
lab-2,NVIDIA H100 SXM5,8,1024,4096,16,1024,8,32,2,8,bf16,0.1
lab-3,NVIDIA H100 SXM5,,1024,4096,16,1024,8,32,1,8,bf16,0.1
"""


def test_validate_compares_and_skips(capsys, tmp_path):
    """Every row has a prediction or a reason; groups add them up."""
    path = tmp_path / "table.csv"
    path.write_text(TABLE, encoding="utf-8")

    found = printed(capsys, "validate", str(path))

    assert [("skipped" in row) for row in found["rows"]] == [False, False, True]
    assert set(found["rows"][0]) >= {
        "id", "predicted_step_time_s", "predicted_tokens_per_s_per_accel", "predicted_mfu", "predicted_peak_memory_gib",
        "measured_step_time_s", "error_pct",
    }  # fmt: skip
    assert found["groups"][0]["count"] == 2
    assert run(["validate", str(path)]) == 0
    assert "layers is not given" in capsys.readouterr().out
