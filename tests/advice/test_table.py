"""The answers that docs/advise-table.md shows, by hand arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plait.hardware.catalogue import find
from plait.plan.space import unsupported
from plait.schema import Plan

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "benchmarks" / "results" / "advise.json").read_text(encoding="utf-8"))


MODELS = ("llama 8B", "llama 70B", "llama 405B", "mixtral 8x7B", "vit", "recommender", "small")
TASKS = ("train", "finetune", "serve")


def test_all_models_and_tasks_are_there_once_and_were_quick():
    """Seven models, three tasks; each took under a minute without a kept capture and under 15 s with one when measured."""
    assert [(r["model"], r["task"]) for r in ROWS] == [(m, t) for m in MODELS for t in TASKS]
    assert max(r["cold_s"] for r in ROWS) < 60
    assert max(r["cached_s"] for r in ROWS) < 15


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['model']}-{r['task']}")
def test_hours_times_price_are_dollars_and_memory_parts_add_up(row):
    """And work over speed is hours."""
    if row["usd_per_hour"] is not None:
        assert row["usd"] == pytest.approx(row["hours"] * row["usd_per_hour"])
    assert sum(row["memory_parts_gib"].values()) == pytest.approx(row["memory_gib"])
    assert float(row["work"].split()[0]) / row["speed"] / 3600 == pytest.approx(row["hours"], rel=1e-3)


@pytest.mark.parametrize("size", ["8B", "70B", "405B"])
def test_llama_s_hours_by_hand(size):
    """Six FLOP a parameter and token, over the accelerators' bf16 peak times the share of it that is advised."""
    row = next(r for r in ROWS if (r["model"], r["task"]) == (f"llama {size}", "train"))
    count, _, part = row["answer"].partition(" ")
    rate = float(count) * find(part).device.peak("bf16") * row["mfu"]
    hours = 6 * row["parameters"] * float(row["work"].split()[0]) / rate / 3600

    # Attention adds to the six, the table of tokens takes from them.
    assert row["hours"] == pytest.approx(hours, rel=0.12)


@pytest.mark.parametrize("row", [r for r in ROWS if r["task"] != "serve"], ids=lambda r: f"{r['model']}-{r['task']}")
def test_what_is_advised_can_be_launched(row):
    """Each plan of the page is one that plait's own runtime executes, expert parallelism apart, which the words say."""
    missing = unsupported(Plan.parse(row["plan"]))

    assert all(reason.startswith("ep=") for reason in missing)
    assert ("--runnable leaves such plans out" in row["advice"]) == bool(missing)


def test_the_small_network_stays_on_this_computer():
    """Ten million parameters need no accelerator, whatever is done with them, and the words say so."""
    small = [r for r in ROWS if r["model"] == "small"]

    assert all(9e6 < r["parameters"] < 1.2e7 for r in small)
    assert all(
        r["answer"].endswith("this computer's CPU") and r["advice"].startswith("Take this computer") for r in small
    )


def test_adapters_cost_less_than_training_and_larger_models_more():
    """Of one family, in both directions."""
    usd = {(r["model"], r["task"]): r["usd"] for r in ROWS}
    sizes = ["llama 8B", "llama 70B", "llama 405B"]

    for task in ("train", "finetune", "serve"):
        assert [usd[m, task] for m in sizes] == sorted(usd[m, task] for m in sizes)
    assert all(usd[m, "finetune"] < usd[m, "train"] for m in sizes)


def test_the_page_has_the_rows():
    """What the page shows is what was measured."""
    page = (ROOT / "docs" / "advise-table.md").read_text(encoding="utf-8")

    for row in ROWS:
        assert f"| {row['model']} | {row['task']} | {row['work']} | {row['answer']} |" in page
        assert row["advice"] in page
