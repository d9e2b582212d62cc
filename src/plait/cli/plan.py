"""`plait plan`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.clusters import ClusterName, cluster_of
from plait.cli.options import Batch, Json, Target
from plait.cli.output import only_result_on_stdout, plain_json, show

__all__ = ["plan"]


def plan(
    target: Target,
    cluster: ClusterName,
    batch: Batch = None,
    top: Annotated[int, typer.Option("--top", min=1, metavar="K", help="Plans to show.")] = 5,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", metavar="fp32|bf16|fp8", help="Default: fp32 on CPUs, else bf16.", show_default=False
        ),
    ] = None,
    runnable: Annotated[bool, typer.Option("--runnable", help="Only plans that plait itself can run.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Also search a node more and a node less.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="plan.yaml", help="Write the best plan here.", show_default=False),
    ] = None,
    json: Json = False,
) -> int:
    """Find the fastest plan that fits a model on a cluster, the runners-up, and why."""
    from plait.cost.step import estimate
    from plait.plan.explain import explain as reasons
    from plait.plan.search import search
    from plait.plan.space import Space

    with only_result_on_stdout(json):
        from plait.capture.graphs import graph_of

        where = cluster_of(cluster)
        graph, own = graph_of(target)
        space = Space(executable=runnable)
        found = search(graph, where, batch=batch or own, top=top, precision=precision, space=space)
        told = reasons(found, graph, where, space=space, other_counts=None if explain else ())
        result: dict[str, Any] = found.to_dict()
        result |= {"cluster": where.name, "explanation": list(told.lines), "notes": list(where.notes)}
        if told.devices:
            result["other_device_counts"] = {str(count): seconds for count, seconds in told.devices.items()}
        if output is not None:
            best = found.plans[0]
            shown = estimate(graph, where, best.plan, best.batch, timeline=max(4, 1600 // best.plan.pp))
            _write(output, target, where.name, result, shown)
    show(result, json, _text)
    if output is not None and not json:
        typer.echo(f"\nwritten to {output}")
    return 0


def _write(path: Path, target: str, cluster: str, result: Mapping[str, Any], shown: Any) -> None:
    """The plan; its estimate and, under `report`, what `plait report` shows of the search beside it."""
    import yaml

    from plait.errors import PlanError

    best, *others = result["plans"]
    report = {
        "memory": [parts.to_dict() for parts in shown.memory],
        "timeline": [span.to_dict() for span in shown.timeline],
        "alternatives": [_short(other["estimate"]) for other in others],
        "pareto": [_short(entry["estimate"]) for entry in result["pareto"]],
        "explanation": result["explanation"],
        "notes": result["notes"],
    }
    data = {"target": target, "cluster": cluster, "plan": best["plan"], "estimate": best["estimate"], "report": report}
    try:
        path.write_text(yaml.safe_dump(plain_json(data), sort_keys=False), encoding="utf-8")
    except OSError as problem:
        raise PlanError(f"plan file {path}: {problem.strerror}") from None


def _short(estimate: Mapping[str, Any]) -> dict[str, Any]:
    """What a table of plans shows of one."""
    return {name: estimate[name] for name in ("spec", "step_time_s", "tokens_per_s", "peak_memory_gib", "usd_per_step")}


def _text(result: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from plait.units import format_seconds

    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, emoji=False)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("plan", "step", "tokens/s", "use %", "GiB", "$/1000 steps"):
        table.add_column(title, justify="left" if title == "plan" else "right", overflow="fold")
    for entry in result["plans"]:
        found = entry["estimate"]
        usd = found["usd_per_step"]
        table.add_row(
            entry["spec"] + (" *" if "not_executable" in entry else ""),
            format_seconds(found["step_time_s"]),
            f"{found['tokens_per_s']:,.0f}",
            f"{100 * found['mfu']:.1f}",
            f"{found['peak_memory_gib']:.1f}",
            "" if usd is None else f"{1000 * usd:.2f}",
        )
    console.print(table)
    if any("not_executable" in entry for entry in result["plans"]):
        console.print("* planned, but plait's own runtime cannot run it yet; --runnable leaves such plans out")
    for line in result["explanation"]:
        console.print(line, markup=False, highlight=False)
    console.print(f"\n{result['tried']} plans estimated of {result['groups']} groups in {result['seconds']:.1f} s")
    for refusal in result["refused"][:6]:
        console.print(
            f"  refused {refusal['count']}: {refusal['reason']} ({refusal['example']})", markup=False, highlight=False
        )
    for note in result["notes"]:
        console.print(f"  note: {note}", markup=False, highlight=False)
