"""`plait doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.cli.options import Json
from plait.cli.output import only_result_on_stdout, show

__all__ = ["doctor"]

_MARK = {"ok": "[green]ok[/]", "absent": "[dim]absent[/]", "warning": "[yellow]warning[/]", "broken": "[red]broken[/]"}


def doctor(json: Json = False) -> int:
    """What works on this machine, what doesn't, and why."""
    from plait.run.doctor import examine

    with only_result_on_stdout(json):
        result = examine()
    show(result, json, _text)
    return 0 if result["ok"] else 1


def _text(result: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("", "what", "state", "detail"):
        table.add_column(title, overflow="fold")
    group = ""
    for check in result["checks"]:
        shown = check["group"] if check["group"] != group else ""
        group = check["group"]
        table.add_row(f"[bold]{shown}[/]", check["name"], _MARK[check["state"]], escape(check["detail"]))
    console = Console(emoji=False)
    console.print(table)
    broken = [check["name"] for check in result["checks"] if check["state"] == "broken"]
    console.print(f"[red]broken:[/] {', '.join(broken)}" if broken else "plait can train and verify here")
