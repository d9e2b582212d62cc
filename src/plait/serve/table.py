"""The report of an export as tables for a person."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["exit_status", "text"]

_MIB = 2**20
_NARROW = 110  # columns, below which folders and reasons stand under the table alone


def exit_status(report: Mapping[str, Any], asked: str) -> int:
    """1 if a backend that was tried failed; 2 if one that was asked for by name cannot be had; else 0."""
    states = [row["status"] for row in report["rows"]]
    if "failed" in states or report.get("report_error") or report.get("tuned", {}).get("error"):
        return 1
    if not any(state in ("ok", "prepared") for state in states):
        return 2
    named = {word.strip() for word in asked.split(",")} - {"all"}
    refused = [row for row in report["rows"] if row["status"] in ("missing", "refused") and row["backend"] in named]
    return 2 if refused else 0


def text(report: Mapping[str, Any]) -> None:
    """What was exported, how long it takes, how accurate it is, and what went wrong, on stdout."""
    console = Console(width=None if sys.stdout.isatty() else 140, emoji=False)
    weights = "random weights, parity held on moved ones" if report["weights"] == "random" else "weights as given"
    console.print(
        f"{report['model']}: {report['parameter_bytes'] / _MIB:.1f} MiB of parameters, {weights}", highlight=False
    )
    for entry in report["entries"].values():
        limits = ", ".join(f"{name} {low} to {high}" for name, (low, high) in entry["dims"].items())
        inputs = ", ".join(f"{i['name']}[{', '.join(map(str, i['shape']))}]" for i in entry["inputs"])
        console.print(f"{entry['name']}({inputs}): {limits or 'this shape only'}", highlight=False)
    if "placement" in report:
        placement = report["placement"]
        console.print(f"threads: {placement['reason']}", highlight=False, soft_wrap=True)
        if "start_file" in placement:
            console.print(f"to serve: bash {placement['start_file']} COMMAND...", highlight=False, soft_wrap=True)
    rows = report["rows"]
    is_narrow = console.width < _NARROW
    _print(console, _artefacts(rows, is_narrow))
    if is_narrow and any(row.get("folder") for row in rows):
        parents = dict.fromkeys(str(Path(row["folder"]).parent) for row in rows if row.get("folder"))
        console.print(f"in {', '.join(parents)}, each in a folder of its name", highlight=False, soft_wrap=True)
    _print(console, _latencies(rows, report["best"]))
    _print(console, _data(rows))
    for why in dict.fromkeys(_without_data(rows, report["entries"])):
        console.print(f"\n{why}", highlight=False, soft_wrap=True)
    _print(console, _generations(rows))
    decoder = report.get("decoder")
    if decoder and not decoder["ok"]:
        console.print(f"\nno key-value cache: {decoder['error']}", highlight=False)
    tuned = report.get("tuned")
    if tuned:
        _tuned(console, tuned)
    for row in rows:
        _problem(console, row)
    if report.get("report_error"):
        console.print(f"\n{report['report_error']}", highlight=False)


def _tuned(console: Console, tuned: Mapping[str, Any]) -> None:
    if "error" in tuned:
        console.print(f"\nnot tuned: {tuned['error']}\n  hint: {tuned['hint']}", highlight=False)
        return
    best = tuned["best"]
    parts = [f"threads={best['threads']}", f"batch={best['batch']}"]
    parts += [f"cores={','.join(map(str, best['cpus']))}"] if best["cpus"] else []
    parts += [f"{name}={value}" for name, value in best["knobs"].items()]
    parts += [f"wait={best['wait']}"] if best["wait"] else []
    how = f"best of {tuned['trials']} configurations" if tuned["measured"] else "from the record, not measured"
    gain = f"{tuned['best_ms']:.3g} ms a sample"
    if best == tuned["default"]:
        gain += "; these are the default settings, nothing beat them by more than chance"
    elif tuned["default_ms"] is not None:
        gain += f", {tuned['ratio']:.2f} of the default settings' in turns ({tuned['default_ms']:.3g} ms)"
    console.print(f"\ntuned ({how}): {tuned['folder']} with {' '.join(parts)}: {gain}", highlight=False, soft_wrap=True)
    if tuned["interpreter"] != sys.executable:
        console.print(
            f"  its runtime is in an environment of its own: {tuned['interpreter']}", highlight=False, soft_wrap=True
        )
    if tuned["warning"]:
        console.print(f"  {tuned['warning']}", highlight=False, soft_wrap=True)
    for text in tuned.get("left_out", ()):
        console.print(f"  left out: {text}", highlight=False, soft_wrap=True)
    shell = " ".join(
        f'{name}="{value}"' if " " in value else f"{name}={value}" for name, value in tuned["environment"].items()
    )
    console.print(
        f"  start the server with {shell}, and load it by plait.serve.load_tuned({tuned['record']!r})",
        highlight=False,
    )


def _generations(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(("greedy", "tokens as eager", "prefill", "decode", "eager prefill", "eager decode"))
    for row in rows:
        found = row.get("generation")
        if not found:
            continue
        same = f"{found['tokens']} of {found['tokens']}"
        if not found["equal"]:
            same = f"{found['first_difference']}, then a margin of {found['margin']:.1e}"
        rates = [
            f"{found[who][what]:,.0f}/s" if who in found else ""
            for who in ("backend", "eager")
            for what in ("prefill_tokens_per_s", "decode_tokens_per_s")
        ]
        table.add_row(_name(row), same, *rates)
    return table


def _print(console: Console, table: Table) -> None:
    if table.row_count:
        console.print()
        console.print(table)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 1 else "right", overflow="fold", no_wrap=i < 1)
    return table


def _name(row: Mapping[str, Any]) -> str:
    words = (row["backend"], "" if row["precision"] == "fp32" else row["precision"], row.get("variant", ""))
    return " ".join(filter(None, words))


def _artefacts(rows: Sequence[Mapping[str, Any]], is_narrow: bool) -> Table:
    table = _table(
        (
            *("backend", "state", "size", "export", "max error", "mean error", "rel. error", "memory"),
            *(() if is_narrow else ("folder or reason",)),
        )
    )
    for row in rows:
        checks = [*row.get("parity", ()), *row.get("perturbed", ())]
        memory = row.get("serve_peak_bytes")
        note = row.get("facts", {}).get("note", "") if isinstance(row.get("facts"), dict) else ""
        table.add_row(
            _name(row),
            row["status"],
            f"{row['bytes'] / _MIB:.1f} MiB" if row.get("bytes") and row.get("keeps", True) else "",
            f"{row['export_s']:.1f} s" if "export_s" in row and row.get("keeps", True) else "",
            _worst(checks, "max_abs"),
            _worst(checks, "mean_abs"),
            _worst(checks, "max_rel"),
            f"{memory / _MIB:.0f} MiB" if memory else "",
            *(
                []
                if is_narrow
                else [row.get("folder") or (note if row["status"] == "ok" else row.get("error", "")[:70])]
            ),
        )
    return table


def _worst(checks: Sequence[Mapping[str, Any]], key: str) -> str:
    return f"{max(one[key] for one in checks):.1e}" if checks else ""


def _latencies(rows: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]]) -> Table:
    first = {(b["precision"], b["entry"], b["batch"], b["threads"]): b["backend"] for b in best}
    table = _table(
        ("backend", "batch", "threads", "p50 ms", "p99 ms", "samples/s", "eager p50", "compile p50", "of eager", "best")
    )
    for row in rows:
        for one in row.get("latency", ()):
            mine, compiled = one["backend"], one.get("compile")
            is_best = first.get((row["precision"], one["entry"], one["batch"], one["threads"])) == row["backend"]
            table.add_row(
                _name(row) if one["entry"] == "forward" else f"{_name(row)} {one['entry']}",
                str(one["batch"]),
                str(one["threads"]),
                f"{mine['p50_ms']:.2f}",
                f"{mine['p99_ms']:.2f}",
                f"{mine['samples_per_s']:.{1 if mine['samples_per_s'] < 1000 else 0}f}",
                f"{one['eager']['p50_ms']:.2f}" + ("" if one["baseline"] == "own" else " (program)"),
                f"{compiled['p50_ms']:.2f}" if compiled else "",
                f"{one['ratio']:.2f}",
                "*" if is_best else "",
            )
    return table


def _data(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(("on the data", "batches", "max error", "mean error", "cosine", "same top", "loss fp32", "loss"))
    for row in rows:
        found = row.get("data")
        if found:
            top, before, after = found["top1"], found["loss_fp32"], found["loss"]
            table.add_row(
                _name(row),
                str(found["batches"]),
                f"{found['max_abs']:.1e}",
                f"{found['mean_abs']:.1e}",
                f"{found['cosine']:.5f}",
                "" if top is None else f"{100 * top:.2f} %",
                "" if before is None else f"{before:.5g}",
                "" if after is None else f"{after:.5g}",
            )
    return table


def _without_data(rows: Sequence[Mapping[str, Any]], entries: Mapping[str, Any]) -> list[str]:
    """What the table of the data cannot say, and why."""
    found = [row["data"]["loss_error"] for row in rows if (row.get("data") or {}).get("loss_error")]
    if entries and any(row["status"] == "ok" and "data" in row and row["data"] is None for row in rows):
        found.append("accuracy on the data: not measured, no batch of it has the sizes that are served")
    return found


def _problem(console: Console, row: Mapping[str, Any]) -> None:
    note = (row.get("facts") or {}).get("note")
    if row["status"] in ("ok", "prepared"):
        if note and row.get("folder"):
            console.print(f"\n{_name(row)}: {note}", highlight=False, soft_wrap=True)
        return
    console.print(f"\n{_name(row)} {row['status']}: {row.get('error', '')}", highlight=False, soft_wrap=True)
    if row.get("operator"):
        where = f", at {row['where']}" if row.get("where") else ""
        console.print(f"  operator {row['operator']}{where}", highlight=False, soft_wrap=True)
    if row.get("hint"):
        console.print(f"  hint: {row['hint']}", highlight=False, soft_wrap=True)
