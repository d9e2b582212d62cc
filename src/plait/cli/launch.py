"""`plait launch`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.options import Batch, Json, Plan, Target
from plait.cli.output import only_result_on_stdout, show

__all__ = ["launch"]


def launch(
    target: Target,
    plan: Plan,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="ENGINE",
            help="torchrun, slurm, kubernetes, kubeflow, skypilot, azureml, gcp-tpu, gke-jobset, sagemaker or "
            "parallelcluster.",
            show_default=False,
        ),
    ],
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, metavar="N", help="Default: as the plan needs.", show_default=False)
    ] = None,
    devices_per_node: Annotated[
        int | None,
        typer.Option("--devices-per-node", min=1, metavar="N", help="Default: at most 8.", show_default=False),
    ] = None,
    gpu_type: Annotated[
        str | None,
        typer.Option(
            "--gpu-type",
            metavar="NAME|cpu",
            help="As in `plait hardware list`; default: the plan file's cluster.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Default: launch/NAME-ENGINE.", show_default=False),
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Start the job, too, with the engine's own command.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over files that were changed.")] = False,
    tp_across_nodes: Annotated[
        bool, typer.Option("--tp-across-nodes", help="Allow a plan whose tensor parallelism crosses nodes.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Of the job; default: the target's.", show_default=False),
    ] = None,
    image: Annotated[
        str, typer.Option("--image", metavar="IMAGE", help="Container with plait and the target.", show_default=False)
    ] = "",
    spot: Annotated[bool, typer.Option("--spot", help="Ask for capacity that may be taken back.")] = False,
    interface: Annotated[
        str,
        typer.Option("--interface", metavar="NAME", help="Network interface between nodes.", show_default=False),
    ] = "",
    hosts: Annotated[
        str,
        typer.Option("--hosts", metavar="A,B,...", help="For torchrun over ssh, in their order.", show_default=False),
    ] = "",
    restarts: Annotated[int, typer.Option("--restarts", min=0, metavar="N", help="After failures.")] = 3,
    run_dir: Annotated[
        str,
        typer.Option("--run-dir", metavar="DIR", help="Log and checkpoints, as a node sees it.", show_default=False),
    ] = "",
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, metavar="N", help="Optimizer steps.", show_default=False)
    ] = None,
    batch: Batch = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Of weights, data order and dropout.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", help="Text for an hf: target, as a node sees it.", show_default=False),
    ] = None,
    checkpoint_minutes: Annotated[
        float, typer.Option("--checkpoint-minutes", min=0, metavar="M", help="Between checkpoints.")
    ] = 10,
    json: Json = False,
) -> int:
    """Write the files that run a plan on an engine; start nothing without --submit."""
    from plait.jobs.launch import LaunchOptions
    from plait.jobs.launch import launch as write_job

    with only_result_on_stdout(json):
        result = write_job(
            target,
            plan,
            to,
            LaunchOptions(
                nodes=nodes,
                devices_per_node=devices_per_node,
                gpu_type=gpu_type,
                output=output,
                submit=submit,
                force=force,
                tp_across_nodes=tp_across_nodes,
                name=name,
                image=image,
                spot=spot,
                interface=interface,
                hosts=tuple(filter(None, (host.strip() for host in hosts.split(",")))),
                restarts=restarts,
                run_dir=run_dir,
                steps=steps,
                batch=batch,
                seed=seed,
                data=data,
                checkpoint_minutes=checkpoint_minutes,
            ),
        )
    show(result, json, _text)
    return 0


def _text(result: Mapping[str, Any]) -> None:
    part = result["accelerator"] or "no accelerator asked for"
    typer.echo(
        f"{result['name']} for {result['engine']}: {result['plan']} on {result['nodes']} x "
        f"{result['devices_per_node']} devices ({part})\n"
    )
    for axis in result["placement"]:
        where = "inside one node" if axis["inside_node"] else f"over {axis['nodes']} nodes"
        typer.echo(f"  {axis['axis']:<5} {axis['degree']:>4}   {where}")
    typer.echo("")
    for path in result["files"]:
        typer.echo(f"  {path}")
    typer.echo("")
    for note in result["notes"]:
        typer.echo(f"  note: {note}")
    typer.echo(
        ("started: " if result["submitted"] else "nothing was started; to start it: ") + shlex.join(result["submit"])
    )
