"""`plait validate`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.options import Json
from plait.cli.output import only_result_on_stdout, show

__all__ = ["validate"]


def validate(
    table: Annotated[Path, typer.Argument(metavar="TABLE.csv", help="Measurements, in the columns of docs/cost.md.")],
    json: Json = False,
) -> int:
    """Hold predictions against published measurements, by source and accelerator."""
    from plait.cost.calibration import load_calibration
    from plait.cost.table import read_table
    from plait.cost.validate import validate as compare

    with only_result_on_stdout(json):
        found = compare(read_table(table))
        result = {
            "rows": [item.to_dict() for item in found.rows],
            "groups": found.groups(),
            "summary": found.summary(),
            "calibration": load_calibration().provenance,
        }
    show(result, json, _text)
    return 0


def _cell(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def _text(result: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 180, soft_wrap=True, emoji=False)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in (
        "source",
        "accelerator",
        "rows",
        "n",
        "time error %",
        "bias %",
        "shape %",
        "memory n",
        "memory %",
        "worst rows",
    ):
        table.add_column(title, justify="left" if title in ("source", "accelerator", "worst rows") else "right")
    for group in result["groups"]:
        worst = ", ".join(f"{w['id'].rsplit('-', 1)[-1]} {w['error_pct']:+.0f}%" for w in group["worst"])
        table.add_row(
            group["source"],
            group["accelerator"],
            str(group["rows"]),
            str(group["count"]),
            _cell(group["median_error_pct"]),
            _cell(group["bias_pct"], "+.1f"),
            _cell(group["shape_error_pct"]),
            str(group["memory_count"] or ""),
            _cell(group["memory_error_pct"]),
            worst,
        )
    console.print(table)
    s = result["summary"]
    left_out = result["calibration"].get("left_out_mean_pct", "not measured")
    console.print(f"{s['predicted']} of {s['rows']} rows predicted, mean over groups of their median absolute error:")
    console.print(
        f"  left out  {left_out} % (each source predicted by a fit without it; benchmarks/fit_cost.py --left-out)"
    )
    for title, name, count in (
        ("level", "level_error_pct", f"{s['groups']} groups"),
        ("shape", "shape_error_pct", "one factor for each group taken out"),
        (
            "memory",
            "memory_error_pct",
            f"{s['memory_groups']} groups, {_cell(s['memory_20_under_pct'])} % of rows over 20 % too low",
        ),
    ):
        if s[name] is not None:
            console.print(f"  {title:<9} {s[name]:.1f} % ({count})")
    if s["rank_correlation"] is not None:
        console.print(
            f"  rank correlation {s['rank_correlation']:.2f}, the plan picked loses {s['pick_loss_pct']:.1f} % "
            f"({s['sets']} sets of 8 or more configurations)"
        )
    reasons = Counter(row["skipped"] for row in result["rows"] if "skipped" in row)
    for reason, times in reasons.most_common():
        console.print(f"  skipped {times}: {reason}", markup=False)
