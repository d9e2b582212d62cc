"""The report as one web page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

import plait
from plait.errors import RequestError
from plait.report.charts import Chart, charts
from plait.report.sources import PARTS, Report, read_report
from plait.schema import Plan
from plait.units import format_bytes, format_count, format_seconds

__all__ = ["fact_lines", "page", "write_report"]

_STYLE = """
:root { color-scheme: light; --line: #dfe3e8; --soft: #5d6875; --good: #23753c; --bad: #b3372a; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: #1d242c; font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
header p, .caption, footer { color: var(--soft); }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .2rem; }
header p { margin: .2rem 0 1rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.1rem; margin: 0 0 1rem; }
.caption { margin: 0 0 .6rem; font-size: .92rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .7rem 1.2rem; margin: 0; }
.facts div { min-width: 0; }
.facts .wide { grid-column: 1 / -1; }
dt { color: var(--soft); font-size: .82rem; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.big dd { font-size: 1.15rem; }
svg { display: block; width: 100%; height: auto; }
.narrow { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
td code { display: inline-block; min-width: 12.5rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
ul { margin: .2rem 0 0; padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1rem .6rem 2rem; } section { padding: .8rem; }
  table { font-size: .82rem; } th, td { padding-right: .45rem; }
  .wide-only { display: none; } .narrow { display: block; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
# Nothing may be loaded, and no script may run, whatever the texts above hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

_WORDS = {
    "tokens_per_s": "tokens per second", "samples_per_s": "samples per second", "mfu": "utilisation (MFU)",
    "step_time_s": "step", "peak_memory_gib": "peak memory", "usd_per_step": "1000 steps cost", "fits": "fits",
    "seconds": "time", "peak_memory": "peak memory",
}  # fmt: skip
_NUMBER = ' class="number"'
_WIDE_CELL = '<div class="wide">'
_WIDE = ("target", "plan", "cluster")


def write_report(source: Path, output: Path | None = None) -> dict[str, Any]:
    """Write the page of a run directory or a plan file (beside it unless `output` says where); what it holds.

    Raises:
        RequestError: the source is neither, matplotlib is missing, or the page cannot be written.
    """
    report = read_report(source)
    shown = charts(report)
    path = output or (source / "report.html" if source.is_dir() else source.with_name(f"{source.stem}-report.html"))
    text = page(report, shown)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise RequestError(
            f"report: {path}: {problem.strerror}", hint="pass -o with a file that can be written"
        ) from None
    return {
        "report": str(path),
        "kind": report.kind,
        "title": report.title,
        "charts": [title for title, *_ in shown],
        "facts": {name: value for name, value in report.facts.items() if value is not None},
        "notes": report.notes,
        "bytes": len(text.encode()),
    }


def page(report: Report, shown: Sequence[Chart]) -> str:
    """The HTML."""
    what = "training run" if report.kind == "run" else "plan"
    parts = [
        f"<section>{_facts(report)}</section>",
        *(_chart(chart) for chart in shown if chart[0] != "Plans"),
        _comparison(report),
        _alternatives(report, next((chart for chart in shown if chart[0] == "Plans"), None)),
        _verified(report),
        _plan(report.plan),
        _machine(report),
        _notes(report),
    ]
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(report.title)}: plait report</title>
<style>{_STYLE}</style>
</head>
<body><main>
<header><h1>{escape(report.title)}</h1><p>{what}, by plait {escape(plait.__version__)}</p></header>
{chr(10).join(part for part in parts if part)}
</main></body>
</html>
"""


def _section(title: str, body: str, caption: str = "") -> str:
    said = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def _chart(chart: Chart) -> str:
    title, caption, wide, narrow = chart
    # One of the two is shown; the title says to everybody what it is.
    body = "".join(
        f'<div class="{name}" role="img" aria-label="{escape(title)}">{svg}</div>'
        for name, svg in (("wide-only", wide), ("narrow", narrow))
    )
    return _section(title, body, caption)


def fact_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value with its unit) of what is known."""
    known = {name: value for name, value in facts.items() if value is not None and value != ""}
    return [(_WORDS.get(name, name.replace("_", " ")), _shown(name, value)) for name, value in known.items()]


def _facts(report: Report) -> str:
    cells = []
    for label, value in fact_lines(report.facts):
        is_wide = label in _WIDE
        inner = f"<code>{escape(value)}</code>" if is_wide else escape(value)
        cells.append(f"{_WIDE_CELL if is_wide else '<div>'}<dt>{escape(label)}</dt><dd>{inner}</dd></div>")
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _shown(name: str, value: Any) -> str:
    """A value with its unit, as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value).replace("T", " ").replace("+00:00", " UTC") if name == "began" else str(value)
    if name in _UNITS:
        return _UNITS[name](value)
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _dollars(usd: float) -> str:
    """Of a thousand steps."""
    return f"${1000 * usd:,.2f}" if 1000 * usd >= 0.01 else f"${1000 * usd:.2g}"


_UNITS: dict[str, Callable[[float], str]] = {
    "step_time_s": format_seconds,
    "seconds": format_seconds,
    "peak_memory": format_bytes,
    "peak_memory_gib": lambda value: format_bytes(value * 2**30),
    "parameters": format_count,
    "mfu": lambda value: f"{100 * value:.1f} %",
    "usd_per_step": _dollars,
    "loss": lambda value: f"{value:.4g}",
    "evaluation_loss": lambda value: f"{value:.4g}",
}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 1) -> str:
    """Rows of HTML cells; the columns from `numbers` on hold numbers. Cells are escaped by whoever makes them."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{_NUMBER if i >= numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _comparison(report: Report) -> str:
    """Prediction beside measurement; either alone where there is only one."""
    names = [
        name
        for name in ("step_time_s", *PARTS, "communication_hidden", "tokens_per_s", "peak_memory")
        if max(report.predicted.get(name, 0.0), report.measured.get(name, 0.0)) > 1e-7  # s; what is less is nothing
    ]
    if not names:
        return ""
    rows = []
    for name in names:
        predicted, measured = report.predicted.get(name), report.measured.get(name)
        error = f"{100 * (predicted / measured - 1):+.0f} %" if predicted is not None and measured else ""
        rows.append(
            [escape(_WORDS.get(name, name.replace("_", " "))), _figure(name, predicted), _figure(name, measured), error]
        )
    if not report.measured:
        return _section("A step in figures", _table(("", "predicted"), [row[:2] for row in rows]))
    if not report.predicted:
        return _section("A step in figures", _table(("", "measured"), [[row[0], row[2]] for row in rows]))
    return _section("Predicted beside measured", _table(("", "predicted", "measured", "error"), rows))


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name == "tokens_per_s":
        return f"{value:,.0f}"
    return format_bytes(value) if name == "peak_memory" else format_seconds(value)


def _alternatives(report: Report, chart: Chart | None) -> str:
    if len(report.alternatives) < 2:
        return ""
    front = {row["spec"] for row in report.pareto}
    listed = {row["spec"] for row in report.alternatives}
    everything = [*report.alternatives, *(row for row in report.pareto if row["spec"] not in listed)]
    rows = [
        [
            str(number),
            f"<code>{escape(row['spec'])}</code>{' *' if row['spec'] in front else ''}",
            format_seconds(row["step_time_s"]),
            format_bytes(row["peak_memory_gib"] * 2**30),
            f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "",
            _dollars(row["usd_per_step"]) if "usd_per_step" in row else "",
        ]
        for number, row in enumerate(everything, 1)
    ]
    table = _table(("", "plan", "step", "memory", "tokens/s", "1000 steps"), rows, numbers=2)
    star = " * is on the front of step time and memory." if front else ""
    drawn = (
        ""
        if chart is None
        else "".join(
            f'<div class="{name}" role="img" aria-label="Plans">{svg}</div>'
            for name, svg in (("wide-only", chart[2]), ("narrow", chart[3]))
        )
    )
    return _section("The plan and those behind it", table + drawn, f"The first is the one in the file.{star}")


def _verified(report: Report) -> str:
    record = report.verified
    if not record:
        return ""
    word = '<b class="good">holds</b>' if record.get("ok") is True else '<b class="bad">does not hold</b>'
    rows = [
        [escape(label), escape(_small(record.get(name)))]
        for name, label in (
            ("max_loss_diff", "largest difference of a loss"),
            ("max_grad_rel_err", "largest relative error of a gradient"),
            ("max_param_rel_err", "largest relative error of a parameter after the last step"),
            ("steps", "steps"),
            ("devices", "processes"),
            ("date", "date"),
        )
        if record.get(name) is not None
    ]
    return _section(
        "Parity with one device",
        f"<p>Parity {word}.</p>{_table(('', ''), rows)}",
        "Of `plait verify`, for the same target and plan.",
    )


def _small(value: Any) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)


def _plan(plan: Plan | None) -> str:
    if plan is None:
        return ""
    rows = []
    for item in fields(Plan):
        value = getattr(plan, item.name)
        if value != item.default or item.name in (
            "dp",
            "fsdp",
            "tp",
            "pp",
            "microbatches",
            "schedule",
            "recompute",
            "precision",
        ):
            if value in (None, ()):
                continue
            text = ", ".join(map(str, value)) if isinstance(value, tuple) else _pairs(value)
            rows.append([escape(item.name.replace("_", " ")), escape(text if value != 0 else "chosen by the batch")])
    return _section("The plan", _table(("", ""), rows, numbers=2), f"{plan.devices} device{'s' * (plan.devices > 1)}.")


def _pairs(value: Any) -> str:
    return ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def _machine(report: Report) -> str:
    rows = [[escape(str(name)), escape(str(value))] for name, value in report.machine.items() if value is not None]
    return _section("Machine and versions", _table(("", ""), rows, numbers=2)) if rows else ""


def _notes(report: Report) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in dict.fromkeys(report.notes))
    return _section("Notes", f"<ul>{items}</ul>") if items else ""
