"""`plait export`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from plait.cli.options import Json
from plait.cli.output import only_result_on_stdout, show

__all__ = ["export"]


def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="TARGET|RUN_DIR",
            help="path/file.py:function, package.module:function or hf:MODEL_TYPE, with arguments after ?; or the run directory "
            "of a `plait train`.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="BACKEND[,...]|all",
            help="torch, aoti, onnxruntime, openvino, executorch, tensorrt, ...; compile is a row to compare with.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Default: exports/NAME, or in RUN_DIR.", show_default=False),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="P[,...]", help="fp32, bf16, fp16, int8 or int8-weight.")
    ] = "fp32",
    batch: Annotated[
        str, typer.Option("--batch", metavar="N[,...]", help="Batch sizes to time; the largest is the most it serves.")
    ] = "1,8",
    threads: Annotated[
        str,
        typer.Option(
            "--threads",
            metavar="N[,...]",
            help="Threads to time with, and for --tune to choose from; default: as measured for one process, and all counts.",
            show_default=False,
        ),
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Text that the accuracy of an hf: target is measured on; default: the job's own data.",
            show_default=False,
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            min=4,
            metavar="N",
            help="Decoders: also write prefill and decode with a key-value cache of N positions.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="TARGET", help="What RUN_DIR trained, if it does not say so.", show_default=False
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, metavar="S", help="Of timing each batch size; 0: none.")
    ] = 4,
    limit: Annotated[
        float, typer.Option("--limit", min=1, metavar="S", help="Seconds that a backend may take before it is stopped.")
    ] = 600,
    tune: Annotated[bool, typer.Option("--tune", help="Search the fastest settings on this machine.")] = False,
    tune_seconds: Annotated[float, typer.Option("--tune-seconds", min=1, metavar="S", help="For all of --tune.")] = 60,
    tune_for: Annotated[
        str, typer.Option("--tune-for", metavar="latency|throughput", help="Of the first --batch, or over all of them.")
    ] = "latency",
    tune_accuracy: Annotated[
        float,
        typer.Option("--tune-accuracy", min=0, max=1, help="Least cosine of a precision below fp32 that may win."),
    ] = 0.99,
    tune_record: Annotated[
        Path | None,
        typer.Option(
            "--tune-record",
            metavar="FILE",
            help="Take the settings of an earlier --tune; measure nothing.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Write a trained model for serving runtimes, each proven equal to eager and timed beside it."""
    from plait.serve.export import export as write
    from plait.serve.table import exit_status, text

    if tune_for not in ("latency", "throughput"):
        raise typer.BadParameter(f"{tune_for!r} is neither latency nor throughput", param_hint="--tune-for")
    if tune and tune_record is not None:
        raise typer.BadParameter("either search, or take the settings of a record", param_hint="--tune, --tune-record")
    _settle_torchao()
    _end_with_children()
    with only_result_on_stdout(json), _progress(json) as tell:
        report = write(
            what,
            to,
            output=output,
            precision=precision,
            batch=_numbers(batch, "--batch"),
            threads=_numbers(threads, "--threads") if threads else None,
            data=data,
            max_length=max_length,
            target=target,
            seconds=seconds,
            limit=limit,
            tune=tune_seconds if tune else 0.0,
            tune_goal=tune_for,  # type: ignore[arg-type]
            tune_accuracy=tune_accuracy,
            tune_record=tune_record,
            tell=tell,
        )
    show(report, json, text)
    return exit_status(report, to)


def _end_with_children() -> None:
    """Being terminated ends the runtime that works now, too; left alone, it would go on for minutes."""
    import signal
    import sys
    import threading

    if threading.current_thread() is not threading.main_thread():  # nobody else may set it
        return
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # a terminal that is closed, too
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup
            signal.signal(number, lambda got, _: sys.exit(128 + got))


def _settle_torchao() -> None:
    """Keep a library that transformers imports from saying on stderr that it has no CUDA."""
    import logging
    import os

    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    logging.getLogger("torchao").setLevel(logging.ERROR)


def _numbers(words: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise typer.BadParameter(f"{words!r} is not a list of whole numbers such as 1,8", param_hint=option) from None


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, str], None]]:
    """A line on stderr that says what is being done and for how long; a line for each stage where nobody watches."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, quiet=quiet, emoji=False)
    if not console.is_terminal:
        yield lambda backend, stage: console.print(f"{backend or 'export'}: {stage}", highlight=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("export")

        def tell(backend: str, stage: str) -> None:
            progress.update(task, description=f"{backend or 'export'}: {stage}")

        yield tell
