"""Arguments and options that several verbs share, each spelled once."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Batch", "Devices", "Json", "Plan", "Seed", "Target"]

Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="path/file.py:function or package.module:function that returns a plait.Job, or hf:MODEL_TYPE; "
        "arguments after ?, as in examples/gpt.py:job?layers=4&width=256",
        show_default=False,
    ),
]
Devices = Annotated[
    int | None,
    typer.Option(
        "--devices", min=1, metavar="N", help="Devices, or processes of this computer's CPU.", show_default=False
    ),
]
Plan = Annotated[
    str,
    typer.Option(
        "--plan",
        metavar="SPEC|FILE",
        help="How to spread it: dp=2,fsdp=1,tp=2,pp=2,microbatches=4,schedule=1f1b,recompute=none,precision=fp32, "
        "or a plan file.",
        show_default=False,
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch", min=1, metavar="N", help="Global batch in samples; default: the job's own.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of weights, data order and dropout.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
