"""`plait report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.options import Json
from plait.cli.output import only_result_on_stdout, show

__all__ = ["report"]


def report(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR|plan.yaml", help="Of `plait train --run-dir`, or of `plait plan -o`.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="report.html", help="Default: beside it.", show_default=False),
    ] = None,
    json: Json = False,
) -> int:
    """Write a run or a plan as one web page that needs nothing else."""
    from plait.report.page import write_report

    with only_result_on_stdout(json):
        result = write_report(source, output)
    show(result, json, _text)
    return 0


def _text(result: Mapping[str, Any]) -> None:
    from plait.report.page import fact_lines

    typer.echo(f"{result['title']} ({result['kind']})\n")
    for label, value in fact_lines(result["facts"]):
        typer.echo(f"  {label:<20} {value}")
    for note in result["notes"]:
        typer.echo(f"  note: {note}")
    typer.echo(f"\nwritten to {result['report']}, {result['bytes'] / 1024:.0f} KiB: {', '.join(result['charts'])}")
