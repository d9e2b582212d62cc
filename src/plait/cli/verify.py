"""`plait verify`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from plait.cli.options import Batch, Devices, Json, Plan, Seed, Target
from plait.cli.output import only_result_on_stdout, show

__all__ = ["verify"]


def verify(
    target: Target,
    plan: Plan,
    devices: Devices = None,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Optimizer steps to compare.")] = 3,
    batch: Batch = None,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Prove that a plan computes what one device computes: every loss, gradient and parameter."""
    from plait.run.launch import run_verify

    with only_result_on_stdout(json):
        result = run_verify(target=target, devices=devices, plan=plan, steps=steps, batch=batch, seed=seed)
    if result is None:  # of several processes started by torchrun, one has the result
        return 0
    show(result, json, _text)
    return 0 if result["ok"] else 1


def _text(result: Mapping[str, Any]) -> None:
    verdict = "parity holds" if result["ok"] else "parity does NOT hold"
    typer.echo(
        f"{verdict}: {result['plan']} on {result['devices']} processes, {result['steps']} steps, against one device"
    )
    typer.echo("")
    for name, title in (
        ("max_loss_diff", "largest difference of a loss"),
        ("max_grad_rel_err", "largest relative error of a gradient"),
        ("max_param_rel_err", "largest relative error of a parameter after the last step"),
    ):
        value = result.get(name)
        typer.echo(f"  {title:<58} {value:.2e}" if isinstance(value, float) else f"  {title:<58} {value}")
    if not result.get("captured", True):
        typer.echo("  the model could not be captured and ran on its own modules")
    worst = result.get("worst") or []
    if worst:
        typer.echo("\n  worst")
    for entry in worst:
        typer.echo(f"    {_row(entry)}")
    if result.get("certificate"):
        typer.echo(f"\n  certificate: {result['certificate']}")


def _row(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return str(entry)
    parts = [f"{v:.2e}" if isinstance(v, float) else str(v) for v in entry.values()]
    return f"{parts[0]:<48} {'  '.join(parts[1:])}"
