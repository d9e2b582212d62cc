"""`plait verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.options import Batch, Devices, Json, Plan, Seed, Target
from plait.cli.output import only_result_on_stdout, show
from plait.errors import PlanError

__all__ = ["verify"]


def verify(
    target: Target,
    plan: Plan,
    devices: Devices = None,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Optimizer steps to compare.")] = 3,
    batch: Batch = None,
    seed: Seed = 0,
    forward: Annotated[
        bool, typer.Option("--forward", help="Compare serving instead: every output of the eval-mode forward.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="RUN_DIR",
            help="With --forward: a run directory or checkpoint to take the weights from.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Prove that a plan computes what one device computes: every loss, gradient and parameter."""
    from plait.run.launch import run_verify, run_verify_forward

    if weights is not None and not forward:
        raise PlanError("verify: --weights is for --forward", hint="training parity starts from the job's own weights")
    with only_result_on_stdout(json):
        if forward:
            result = run_verify_forward(
                target=target, devices=devices, plan=plan, batch=batch, seed=seed, weights=weights
            )
        else:
            result = run_verify(target=target, devices=devices, plan=plan, steps=steps, batch=batch, seed=seed)
    if result is None:  # of several processes started by torchrun, one has the result
        return 0
    show(result, json, _forward_text if forward else _text)
    return 0 if result["ok"] else 1


def _forward_text(result: Mapping[str, Any]) -> None:
    verdict = "parity holds" if result["ok"] else "parity does NOT hold"
    sizes = " and ".join(map(str, result["batches"]))
    typer.echo(
        f"{verdict}: forward of {result['plan']} on {result['devices']} processes, batches of {sizes}, against the model in "
        "eval mode on one device"
    )
    typer.echo("")
    for name, title in (
        ("max_output_rel_err", "largest difference of an output over its largest element"),
        ("max_output_diff", "largest difference of an output"),
    ):
        typer.echo(f"  {title:<58} {result[name]:.2e}")
    for note in result.get("notes") or []:
        typer.echo(f"  note: {note}")
    if not result.get("captured", True):
        typer.echo("  the model could not be captured and ran on its own modules")
    typer.echo("")
    for row in result["outputs"]:
        typer.echo(f"  {row['name']:<48} {row['shape']!s:<24} {row['rel_err']:.2e}")


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
    for note in result.get("notes") or []:
        typer.echo(f"  note: {note}")
    if not result.get("captured", True):
        typer.echo("  the model could not be captured and ran on its own modules")
    typer.echo("")
    worst = [entry for entry in result.get("worst") or [] if isinstance(entry, Mapping)]
    for entry in ({key: key.replace("_", " ") for key in worst[0]}, *worst) if worst else ():
        typer.echo(_row(entry))
    if result.get("certificate"):
        typer.echo(f"\n  certificate: {result['certificate']}")


def _row(entry: Mapping[str, Any]) -> str:
    name, *figures = (f"{value:.2e}" if isinstance(value, float) else str(value) for value in entry.values())
    return f"  {name:<48} {' '.join(f'{figure:>16}' for figure in figures)}"
