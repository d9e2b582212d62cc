from __future__ import annotations

from plait.schema import Breakdown, Estimate, MemoryParts, Plan

PARTS = MemoryParts(
    parameters=2.0**30, gradients=0.0, optimizer=0.0, activations=2.0**30, transient=0.0, buffers=0.0, overhead=0.0
)
BREAKDOWN = Breakdown(
    compute=0.6,
    recompute=0.1,
    communication_exposed=0.1,
    communication_hidden=9.0,
    bubble=0.1,
    optimizer=0.05,
    other=0.05,
)
FOUND = Estimate(
    plan=Plan(dp=2, pp=2, microbatches=2), cluster="lab", batch=8, step_time_s=1.0, tokens_per_s=8.0, mfu=0.4,
    breakdown=BREAKDOWN, memory=(PARTS, PARTS), memory_limit=3 * 2.0**30, fits=True,
)  # fmt: skip


def test_shown_parts_add_up_to_the_step():
    """Hidden communication takes no time of its own."""
    assert abs(BREAKDOWN.total - 1.0) < 1e-12


def test_summary_has_every_rank():
    """Memory is listed for each of the plan's ranks, in GiB."""
    summary = FOUND.summary()

    assert summary["peak_memory_gib"] == 2.0
    assert summary["peak_memory_gib_by_rank"] == [2.0] * 4
    assert set(summary) >= {"step_time_s", "tokens_per_s", "mfu", "peak_memory_gib", "breakdown", "fits"}


def test_comes_back_equal():
    """An estimate written as JSON is the same when it is read."""
    assert Estimate.from_json(FOUND.to_json()) == FOUND
