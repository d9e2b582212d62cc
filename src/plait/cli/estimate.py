"""`plait estimate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from plait.cli.clusters import ClusterName, cluster_of
from plait.cli.options import Batch, Json, Plan, Target
from plait.cli.output import only_result_on_stdout, show

__all__ = ["estimate"]


def estimate(
    target: Target,
    cluster: ClusterName,
    plan: Plan,
    batch: Batch = None,
    timeline: Annotated[
        int, typer.Option("--timeline", min=0, metavar="N", help="Show the first N pieces of work of each stage.")
    ] = 0,
    json: Json = False,
) -> int:
    """Step time, memory, dollars and energy of one plan on one cluster, before anything runs."""
    from plait.cost.step import estimate as predict
    from plait.plan.space import unsupported
    from plait.schema import Plan as Record

    with only_result_on_stdout(json):
        from plait.capture.graphs import graph_of

        where, spread = cluster_of(cluster), Record.load(plan)
        graph, own = graph_of(target)
        found = predict(graph, where, spread, batch or own, timeline=timeline)
    result: dict[str, Any] = found.summary()
    if reasons := unsupported(found.plan):
        result["not_executable"] = list(reasons)
    if timeline:
        result["timeline"] = [span.to_dict() for span in found.timeline]
    show(result, json, _text)
    return 0


def _text(result: Mapping[str, Any]) -> None:
    from plait.units import format_seconds

    echo = typer.echo
    echo(f"{result['spec']} on {result['cluster']}, batch {result['batch']}")
    echo("")
    echo(f"  step        {format_seconds(result['step_time_s'])}")
    echo(f"  tokens/s    {result['tokens_per_s']:,.0f}")
    echo(f"  utilisation {100 * result['mfu']:.1f} %")
    for name, seconds in result["breakdown"].items():
        if seconds > 0:
            echo(f"    {name.replace('_', ' '):<24} {format_seconds(seconds):>12}")
    limit = result["memory_limit_gib"]
    of = "" if limit is None else f" of {limit:.1f} GiB usable"
    echo(
        f"  memory      {result['peak_memory_gib']:.2f} GiB on the fullest rank{of}: {'fits' if result['fits'] else 'does NOT fit'}"
    )
    for name, value in result["memory_parts_gib"].items():
        if value > 0:
            echo(f"    {name:<24} {value:>9.3f} GiB")
    for lane in result.get("lanes", ()):
        echo(f"  {lane['replicas']} x {' and '.join(lane['devices'])}: {lane['samples']:g} samples each, "
             f"{format_seconds(lane['step_time_s'])}, {lane['peak_memory_gib']:.2f} GiB"
             f"{'' if lane['fits'] else ', does NOT fit'}")  # fmt: skip
    if result["usd_per_step"] is not None:
        echo(f"  cost        ${1000 * result['usd_per_step']:.4g} for 1000 steps")
    if result["joule_per_step"] is not None:
        echo(f"  energy      {result['joule_per_step'] / 3.6e6:.4g} kWh a step, accelerators alone")
    for note in result["notes"]:
        echo(f"  note: {note}")
    for reason in result.get("not_executable", ()):
        echo(f"  plait cannot run this yet: {reason}")
    for span in result.get("timeline", ()):
        echo(f"    rank {span['rank']:>3} {span['kind']:<9} stage {span['stage']:>3} microbatch {span['microbatch']:>4}"
             f"  {format_seconds(span['start'])} to {format_seconds(span['end'])}")  # fmt: skip
