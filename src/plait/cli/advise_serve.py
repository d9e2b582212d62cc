"""What `plait advise --task serve` prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from plait.cli.advise import number, say_explained

__all__ = ["serve_text"]


def serve_text(result: Mapping[str, Any]) -> None:
    """The work, the table, the paragraph and the notes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True, emoji=False)  # hf:llama: is no llama

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    work = result["work"]
    say(f"{result['model']}: {result['parameters']:,} parameters")
    say(f"  {work['load_why']}; {work['amount']:,.0f} {work['unit']} ({work['amount_why']})")
    titles = ("accelerators", "from", f"{work['unit']}/s", f"ms a {work['each']}", "ms first", "$ an hour", "$ a million", "$ spot",
              "batch", "GiB free", "runtime", "price of", "plan")  # fmt: skip
    table = Table(box=box.SIMPLE, pad_edge=False)
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if 2 <= place <= 9 else "left", overflow="fold")
    on_front = [(a["accelerator"], a["spec"]) for a in result["pareto"]]
    spot = "spot" if result["needs"]["spot"] else "on_demand"
    for answer in result["answers"]:
        price = answer[spot]
        mark = " *" if (answer["accelerator"], answer["spec"]) in on_front else ""
        cheap = answer["spot"]
        table.add_row(
            f"{answer['count']:g} {answer['accelerator']}{mark}",
            "" if price is None else f"{price['cloud']} {price['instance_type']} {price['region']}",
            number(answer["throughput_per_s"], 1),
            number(answer["latency_ms"], 2),
            number(answer["first_token_ms"], 0),
            number(price["usd_per_hour"] if price else None, 2),
            number(price["usd_per_million"] if price else None, 4),
            number(cheap["usd_per_million"] if cheap else None, 4),
            str(answer["batch"]),
            number(answer["headroom_gib"], 1),
            answer["runtime"],
            "" if price is None else price["as_of"],
            answer["spec"],
        )
    console.print(table)
    say("* no other way is at once quicker and cheaper\n")
    say(result["advice"])
    for reason in result["answers"][0]["compatibility"]["reasons"]:
        say(f"  {reason}")
    first = result["answers"][0]
    for line in (first["spot" if result["needs"]["spot"] else "on_demand"] or {}).get("security", ()):
        say(f"  security: {line}")
    for line in result["warnings"]:
        say(f"  note: {line}")
    for entry in result["excluded"][:8]:
        say(f"  left out {entry['count']}: {entry['need']}: {entry['reason']} ({entry['example']})")
    say(f"  {result['searched']} ways costed in {result['seconds']:.1f} s")
    say_explained(result, say)
