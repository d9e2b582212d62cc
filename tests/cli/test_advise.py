"""`plait advise`: what it prints, and how mistakes read."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from plait.cli.main import _VERBS, run
from plait.cost.architecture import Architecture, build_graph

GRAPH = build_graph(
    Architecture(
        name="gpt", layers=4, hidden=512, ffn_hidden=2048, heads=8, kv_heads=8, head_dim=64, vocab=4096, seq_len=256
    )
)


@pytest.fixture(autouse=True)
def captured(monkeypatch, tmp_path):
    """A target's graph without torch; no probe of this computer; the verb is there."""
    monkeypatch.setattr("plait.capture.graphs.graph_of", lambda target: (GRAPH, 16))
    monkeypatch.setattr("plait.cli.main._VERBS", tuple(dict.fromkeys((*_VERBS, "advise"))))
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))


ONE = ("advise", "t.py:job", "--tokens", "10B", "--only", "H100-SXM", "--clouds", "aws,gcp")


def test_json_has_what_scripts_need(capsys):
    """One object: the ranked answers, the front, the advice in words, and the figure that was asked about."""
    assert run([*ONE, "--json", "--explain", "usd"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["answers"][0]

    assert set(best) >= {
        "accelerator", "count", "hours", "usd", "usd_spot", "energy_kwh", "mfu", "headroom_gib", "spec", "compatibility",
    }  # fmt: skip
    assert set(best["on_demand"]) >= {"cloud", "instance_type", "region", "as_of", "source", "age_days"}
    assert (best["count"], best["hours"]) in [(a["count"], a["hours"]) for a in found["pareto"]]
    assert best["usd"] == pytest.approx(best["hours"] * best["on_demand"]["usd_per_hour"])
    assert found["explained"]["formula"] == "hours x usd_per_hour"
    assert found["advice"].startswith("Take ")


def test_text_says_what_to_take(capsys):
    """The table, then the paragraph, then notes."""
    assert run([*ONE, "--explain", "memory"]) == 0
    out = capsys.readouterr().out

    assert "Take " in out
    assert "NVIDIA H100 SXM5" in out
    assert "as given by --tokens" in out
    assert "optimizer" in out


def test_serving_has_what_scripts_need(capsys):
    """One object: speed, latency, price for a million, memory, security, and the figure that was asked about."""
    serve = (
        "advise",
        "t.py:job",
        "--task",
        "serve",
        "--only",
        "H100-SXM",
        "--clouds",
        "aws,gcp",
        "--throughput",
        "100",
    )
    assert run([*serve, "--json", "--explain", "throughput"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["answers"][0]

    assert set(best) >= {
        "throughput_per_s", "latency_ms", "first_token_ms", "batch", "precision", "runtime", "usd_per_million", "memory_parts_gib",
    }  # fmt: skip
    assert best["usd_per_million"] == pytest.approx(best["usd"] / found["work"]["amount"] * 1e6)
    assert best["on_demand"]["security"]
    assert found["explained"]["formula"].startswith("batch x replicas")

    assert run(list(serve)) == 0
    out = capsys.readouterr().out

    assert "Take " in out
    assert "a million output tokens" in out
    assert "security:" in out


def test_what_is_advised_is_launched(capsys, tmp_path, monkeypatch):
    """The plan that is written, and the command that is named, make a job's files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.py").write_text("def job(): ...\n", encoding="utf-8")
    assert run([*ONE, "-o", "plan.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    words = shlex.split(found["next"])

    assert words[:5] == ["plait", "launch", "t.py:job", "--plan", "plan.yaml"]
    assert run(words[1:]) == 0
    assert found["answers"][0]["spec"] in capsys.readouterr().out
    assert run(["advise", "t.py:job", "--task", "serve", "-o", "plan.yaml"]) == 2
    assert "--output and --task serve clash" in capsys.readouterr().err


def test_names_are_no_emoji(capsys, monkeypatch):
    """hf:llama: is text."""
    monkeypatch.setattr("plait.capture.graphs.graph_of", lambda target: (replace(GRAPH, name="hf:llama"), 16))
    assert run(list(ONE)) == 0

    assert capsys.readouterr().out.startswith("hf:llama: ")


def test_adapters_are_said(capsys):
    """How many parameters are trained."""
    assert run([*ONE, "--task", "finetune", "--trainable", "lora:rank=4", "--json"]) == 0

    assert any("are trained" in line for line in json.loads(capsys.readouterr().out)["warnings"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["t.py:job", "--task", "serve", "--latency-ms", "1e-9"], "no offer meets --latency-ms"),
        (["t.py:job", "--latency-ms", "10"], "--latency-ms and --task train clash"),
        (["t.py:job", "--task", "finetune", "--trainable", "lora:rank=none"], "rank must be a whole number"),
        (["t.py:job", "--task", "serve", "--explain", "speed"], "not a figure of the answer"),
        (["t.py:job", "--tokens", "lots"], "--tokens 'lots' is not a number"),
        (["t.py:job", "--clouds", "gpc"], "nearest: gcp"),
        (["t.py:job", "--budget", "free"], "--budget 'free' is not a number"),
        (["t.py:job", "--explain", "dollars", *ONE[2:]], "not a figure of the answer"),
        (["MXNet"], "its successor is PyTorch"),
    ],
)
def test_mistakes_are_refused(capsys, options, says):
    """With status 2, the reason and the way out."""
    assert run(["advise", *options]) == 2
    error = capsys.readouterr().err

    assert says in error
    assert "hint:" in error
    assert "Traceback" not in error
