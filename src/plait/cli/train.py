"""`plait train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.options import Batch, Devices, Json, Seed, Target
from plait.cli.output import only_result_on_stdout, show

__all__ = ["train"]


def train(
    target: Target,
    devices: Devices = None,
    plan: Annotated[
        str,
        typer.Option("--plan", metavar="auto|SPEC|FILE", help="As dp=2,pp=2, a plan file, or auto to search for one."),
    ] = "auto",
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, metavar="N", help="Optimizer steps.", show_default=False)
    ] = None,
    batch: Batch = None,
    seed: Seed = 0,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Text for an hf: target, a file or a folder; default: Python's standard library.",
            show_default=False,
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Where log and checkpoints go.", show_default=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the run directory if there is something to continue from.")
    ] = False,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", min=1, metavar="N", help="Evaluate every N steps.", show_default=False)
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option("--checkpoint-every", min=1, metavar="N", help="Checkpoint every N steps.", show_default=False),
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        typer.Option(
            "--checkpoint-minutes", min=0, metavar="M", help="Checkpoint every M minutes.", show_default=False
        ),
    ] = None,
    keep: Annotated[int, typer.Option("--keep", min=1, metavar="K", help="Checkpoints to keep.")] = 2,
    log_every: Annotated[
        int, typer.Option("--log-every", min=1, metavar="N", help="Steps between lines of the log.")
    ] = 1,
    json: Json = False,
) -> int:
    """Train TARGET under a plan."""
    from plait.run.launch import run_train

    with only_result_on_stdout(json):
        result = run_train(
            target=target,
            devices=devices,
            plan=plan,
            steps=steps,
            batch=batch,
            seed=seed,
            data=data,
            run_dir=run_dir,
            resume=resume,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            checkpoint_minutes=checkpoint_minutes,
            keep=keep,
            log_every=log_every,
            json=json,
        )
    if result is not None:  # of several processes started by torchrun, one has the result
        show(result, json, _text)
    return 0


def _text(result: Mapping[str, Any]) -> None:
    """One line for each figure, the losses last, then what the trained model wrote."""
    simple = {
        key: value
        for key, value in result.items()
        if isinstance(value, str | int | float | Path) and not isinstance(value, bool) and key != "sample"
    }
    order = sorted(simple, key=lambda key: "loss" in key)
    width = max((len(key) for key in simple), default=0)
    for key in order:
        value = simple[key]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        typer.echo(f"{key.replace('_', ' '):<{width}}  {shown}")
    if result.get("prediction"):
        _beside(result["prediction"])
    if result.get("sample"):
        typer.echo(f"\n{result['sample']}")


def _beside(rows: Mapping[str, Any]) -> None:
    """Prediction beside measurement."""
    from plait.units import format_bytes, format_seconds

    def shown(name: str, value: float | None) -> str:
        if value is None:
            return "-"
        if name == "peak_memory":
            return format_bytes(value)
        return f"{value:,.0f}" if name == "tokens_per_s" else format_seconds(value)

    typer.echo(f"\n{'':<24}{'predicted':>14}{'measured':>14}{'error':>9}")
    for name, row in rows.items():
        error = "" if row["error_pct"] is None else f"{row['error_pct']:+.0f} %"
        predicted, measured = shown(name, row["predicted"]), shown(name, row["measured"])
        typer.echo(f"{name.replace('_', ' '):<24}{predicted:>14}{measured:>14}{error:>9}")
