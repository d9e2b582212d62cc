"""`plait VERB ...`: finds the verb's file, and turns what happens into an exit status.

0 done, 1 the work failed, 2 what was asked cannot be done, 130 after Ctrl-C
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

import plait
from plait.errors import PlaitError, RequestError

__all__ = ["run"]

# In the order in which a person meets them. Each is a file of this folder with a function of the verb's name,
# or with a typer `app` where the verb has verbs of its own.
_VERBS = (
    "train",
    "verify",
    "plan",
    "estimate",
    "validate",
    "hardware",
    "advise",
    "export",
    "launch",
    "report",
    "doctor",
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Exit status of `plait ARGUMENTS` (the process's own if None)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = _application()(args=given or ["--help"], prog_name="plait", standalone_mode=False)
    except PlaitError as problem:
        # Under torchrun every process meets the same request; one says so.
        if not isinstance(problem, RequestError) or os.environ.get("RANK", "0") == "0":
            _say(str(problem))
        return problem.exit_status
    except _usage_error() as problem:
        _say(_usage_text(problem))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except BrokenPipeError:
        # The reader of a pipe has seen enough; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if result == 130:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
    return result if isinstance(result, int) else 0


def _application() -> typer.Typer:
    app = typer.Typer(
        name="plait",
        help="Train a PyTorch model that was written for one device on many, and prove that it computes the same thing.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def top(
        version: bool = typer.Option(False, "--version", help="Show the version and stop."),
    ) -> None:
        if version:
            typer.echo(f"plait {plait.__version__}")
            raise typer.Exit

    for verb in _VERBS:
        if importlib.util.find_spec(f"plait.cli.{verb}") is None:
            continue
        module = importlib.import_module(f"plait.cli.{verb}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=verb)
        else:
            app.command(verb)(getattr(module, verb))
    return app


def _usage_error() -> type[Any]:
    # typer carries its own click since 0.26; this base has the same name in both.
    return next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _usage_text(problem: Any) -> str:
    context = getattr(problem, "ctx", None)
    command = context.command_path if context is not None else "plait"
    return f"{problem.format_message().rstrip('.')}\n\nhint: {command} --help lists what it takes"


def _say(text: str) -> None:
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr, flush=True)
