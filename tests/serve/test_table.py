"""The report of an export for a person."""

from __future__ import annotations

import pytest
from rich.console import Console

from plait.serve import table

ROWS = [
    {
        "backend": "onnxruntime",
        "precision": "fp32",
        "status": "ok",
        "bytes": 2**20,
        "folder": "exports/a/onnxruntime",
        "data": None,
    },
    {
        "backend": "openvino",
        "precision": "int8",
        "status": "failed",
        "error": "no conversion for aten.polar",
        "operator": "aten.polar",
    },
]
REPORT = {"model": "a", "weights": "given", "parameter_bytes": 2**20, "entries": {}, "rows": ROWS, "best": []}


@pytest.mark.parametrize("width", [80, 140])
def test_it_is_readable_in_a_narrow_terminal(width, monkeypatch, capsys):
    """No line is wider, no name is broken; folders and reasons that have no room in the table stand below it."""
    monkeypatch.setattr(table, "Console", lambda **_: Console(width=width))
    table.text(REPORT)
    out = capsys.readouterr().out

    assert all(len(line) <= width for line in out.splitlines())
    assert "onnxruntime" in out
    assert "openvino int8 failed: no conversion for aten.polar" in out
    assert ("exports/a/onnxruntime" in out) == (width == 140)
    assert ("in exports/a, each in a folder of its name" in out) == (width == 80)


def test_what_the_data_could_not_say_is_said(capsys):
    """No batch that fits, or a loss that raises."""
    loss = "the job's loss raised KeyError: 'y'"
    data = {"batches": 1, "max_abs": 0.0, "mean_abs": 0.0, "cosine": 1.0, "top1": None, "loss_fp32": None, "loss": None}
    rows = [*ROWS, {**ROWS[0], "data": {**data, "loss_error": loss}}]
    entry = {"name": "forward", "inputs": [], "dims": {}}
    table.text({**REPORT, "rows": rows, "entries": {"forward": entry}})
    out = capsys.readouterr().out

    assert loss in out
    assert "no batch of it has the sizes that are served" in out
