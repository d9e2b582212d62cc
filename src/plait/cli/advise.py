"""`plait advise`."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.options import Batch, Json, Target
from plait.cli.output import only_result_on_stdout, plain_json, show
from plait.errors import RequestError

__all__ = ["advise", "number", "say_explained"]

_LIST = "A list split at commas."


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def advise(
    target: Target,
    task: Annotated[str, typer.Option("--task", metavar="train|finetune|serve")] = "train",
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="N", help="To train on, as in 300B; to serve.", show_default=False)
    ] = None,
    batch: Batch = None,
    trainable: Annotated[
        str,
        typer.Option(
            "--trainable",
            metavar="all|lora:rank=N|FRACTION|PATTERN",
            help="What finetune trains: adapters of a rank, a fraction (0.01, 1%) or parameters whose names match.",
        ),
    ] = "all",
    latency_ms: Annotated[
        float | None,
        typer.Option(
            "--latency-ms",
            help="Serving: at most between two tokens of a reply (mean, engine full); of one batch where nothing is decoded.",
            show_default=False,
        ),
    ] = None,
    first_token_ms: Annotated[
        float | None,
        typer.Option(
            "--first-token-ms",
            help="Serving: at most until a prompt's first token, nothing waiting.",
            show_default=False,
        ),
    ] = None,
    throughput: Annotated[
        float | None,
        typer.Option("--throughput", help="Serving: output tokens (samples) a second needed.", show_default=False),
    ] = None,
    input_tokens: Annotated[
        int | None, typer.Option("--input-tokens", help="Serving: of a prompt.", show_default=False)
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option("--output-tokens", help="Serving: of a reply; 0: a plain forward.", show_default=False),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="bf16|fp16|fp32|tf32|fp8|int8",
            help="Where part (and runtime) take it; tf32 to train, int8 to serve. Default: bf16 where there is any; not quantised.",
            show_default=False,
        ),
    ] = "",
    any_plan: Annotated[
        bool,
        typer.Option(
            "--any-plan", help="Training: also fp16, sequence and context parallelism, which plait itself does not run."
        ),
    ] = False,
    runnable: Annotated[
        bool,
        typer.Option("--runnable", help="Training: no expert parallelism either, which plait itself does not run."),
    ] = False,
    budget: Annotated[str | None, typer.Option("--budget", metavar="USD", show_default=False)] = None,
    deadline: Annotated[str | None, typer.Option("--deadline", metavar="HOURS", show_default=False)] = None,
    minimize: Annotated[str, typer.Option("--minimize", metavar="usd|time")] = "usd",
    spot: Annotated[bool, typer.Option("--spot", help="Rank by spot prices, interruptions included.")] = False,
    clouds: Annotated[str, typer.Option("--clouds", help=_LIST, show_default=False)] = "",
    only: Annotated[str, typer.Option("--only", help="Accelerators or families. " + _LIST, show_default=False)] = "",
    avoid: Annotated[str, typer.Option("--avoid", help="Accelerators or families. " + _LIST, show_default=False)] = "",
    require: Annotated[
        str,
        typer.Option(
            "--require",
            metavar="NEED,...",
            help="confidential, encrypted-network, single-tenant, whole-accelerator, no-marketplace, region=eu, jurisdiction=eu.",
            show_default=False,
        ),
    ] = "",
    checkpoint_minutes: Annotated[float, typer.Option("--checkpoint-minutes", help="Between checkpoints.")] = 30.0,
    restart_minutes: Annotated[float, typer.Option("--restart-minutes", help="After an interruption.")] = 10.0,
    interruptions_per_day: Annotated[
        float, typer.Option("--interruptions-per-day", help="Of one spot instance; an assumption.")
    ] = 0.2,
    grid: Annotated[
        float | None, typer.Option("--grid", metavar="KG_PER_KWH", help="CO2 of electricity.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, metavar="K", help="Answers to show.")] = 8,
    explain: Annotated[
        str,
        typer.Option("--explain", metavar="NAME", help="Formula, inputs and sources of a figure.", show_default=False),
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="plan.yaml",
            help="Write the first answer's plan here, for `plait launch`.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Say which accelerators, from which cloud, for how long and for how much."""
    from plait.advice.advise import advise as answers
    from plait.advice.explain import explain as explained
    from plait.advice.needs import Needs, amount
    from plait.advice.retired import refuse_retired
    from plait.advice.serve import advise_serving
    from plait.advice.serve_words import explain_serving, serve_paragraph, serve_warnings
    from plait.advice.words import paragraph, warnings
    from plait.cli.advise_serve import serve_text
    from plait.cli.this_computer import this_computer

    with only_result_on_stdout(json):
        from plait.capture.graphs import graph_of

        refuse_retired(target)
        if output is not None and task == "serve":
            raise RequestError(
                "--output and --task serve clash: what is written is a plan for `plait launch`, which trains",
                hint="`plait export` makes the files for a serving runtime",
            )
        needs = Needs(
            task=task,
            tokens=None if tokens is None else amount("--tokens", tokens),
            batch=batch,
            budget=None if budget is None else amount("--budget", budget),
            deadline=None if deadline is None else amount("--deadline", deadline),
            minimize=minimize,
            spot=spot,
            clouds=_split(clouds),
            only=_split(only),
            avoid=_split(avoid),
            require=_split(require),
            checkpoint_minutes=checkpoint_minutes,
            restart_minutes=restart_minutes,
            interruptions_per_day=interruptions_per_day,
            grid_kg_per_kwh=grid,
            trainable=trainable,
            latency_ms=latency_ms,
            first_token_ms=first_token_ms,
            throughput=throughput,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            precision=precision,
            any_plan=any_plan,
            runnable_only=runnable,
        )
        graph, own = graph_of(target)
        local = this_computer(graph)
        if task == "serve":
            served = advise_serving(graph, needs, local=local, keep=top)
            result = served.summary()
            result["advice"], result["warnings"] = serve_paragraph(served), serve_warnings(served)
            if explain:
                result["explained"] = explain_serving(served, explain)
        else:
            advice = answers(graph, needs, own_batch=own, local=local, keep=top)
            result = advice.summary()
            result["advice"], result["warnings"] = paragraph(advice), warnings(advice)
            if explain:
                result["explained"] = explained(advice, explain)
            result["next"] = _next(result["answers"][0], target, output) if trainable == "all" else ""
            if output is not None:
                _write(output, target, result)
    show(result, json, serve_text if task == "serve" else _text)
    return 0


def _next(answer: Mapping[str, Any], target: str, output: Path | None) -> str:
    """The command that makes the job's files for an answer; '' where plait's runtime does not execute its plan."""
    from plait.hardware.catalogue import load_accelerators
    from plait.jobs.names import name_of

    if answer["not_executable"]:
        return ""
    price = answer["on_demand"] or answer["spot"]
    if price is None:
        return f"plait train {shlex.quote(target)} --plan {shlex.quote(str(output or answer['spec']))}"
    part = load_accelerators()[answer["accelerator"]]
    engine = "gcp-tpu" if part.vendor == "Google" else "skypilot" if name_of(part, "skypilot") else "slurm"
    words = [
        "plait",
        "launch",
        target,
        "--plan",
        str(output or answer["spec"]),
        "--to",
        engine,
        "--gpu-type",
        part.name,
    ]
    if answer["plan_devices"] == answer["count"]:
        words += ["--devices-per-node", str(answer["count"] // price["instances"])]
    return shlex.join(words)


def _write(path: Path, target: str, result: Mapping[str, Any]) -> None:
    """The first answer's plan, with the target and the accelerators that it is for."""
    import yaml

    first = result["answers"][0]
    part = "cpu" if first["on_demand"] is None and first["spot"] is None else first["accelerator"]
    data = {
        "target": target,
        "cluster": f"{first['plan_devices']}x{part}",
        "plan": first["plan"],
        "advice": result["advice"],
    }
    try:
        path.write_text(yaml.safe_dump(plain_json(data), sort_keys=False), encoding="utf-8")
    except OSError as problem:
        raise RequestError(
            f"--output {path}: {problem.strerror}", hint="name a file in a folder that can be written"
        ) from None


def _text(result: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from plait.advice.answer import length

    console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True, emoji=False)  # hf:llama: is no llama

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    work = result["work"]
    say(f"{result['model']}: {result['parameters']:,} parameters")
    say(f"  {work['tokens']:,.0f} {work['unit']}: {work['tokens_why']}")
    say(f"  {work['batch']} samples a step: {work['batch_why']}")
    titles = ("accelerators", "from", "time", "$", "$ spot", "kWh", "use %", "GiB free", "price of", "plan")
    table = Table(box=box.SIMPLE, pad_edge=False)
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if 2 <= place <= 7 else "left", overflow="fold")
    on_front = [(a["accelerator"], a["count"]) for a in result["pareto"]]
    for answer in result["answers"]:
        price = answer["spot" if result["needs"]["spot"] else "on_demand"]
        mark = " *" if (answer["accelerator"], answer["count"]) in on_front else ""
        table.add_row(
            f"{answer['count']} {answer['accelerator']}{mark}",
            "" if price is None else f"{price['cloud']} {price['instance_type']} {price['region']}",
            length(answer["hours"] if price is None else price["hours"]),
            number(answer["usd"], 2),
            number(answer["usd_spot"], 2),
            number(answer["energy_kwh"], 1),
            f"{100 * answer['mfu']:.1f}",
            number(answer["headroom_gib"], 1),
            "" if price is None else price["as_of"],
            answer["spec"],
        )
    console.print(table)
    say("* no other answer is at once faster and cheaper\n")
    say(result["advice"])
    told = result["answers"][0]["compatibility"]
    for reason in (*(told["reasons"] if told else ()), *result["answers"][0]["not_executable"]):
        say(f"  {reason}")
    first = result["answers"][0]
    for line in (first["spot" if result["needs"]["spot"] else "on_demand"] or {}).get("security", ()):
        say(f"  security: {line}")
    for line in result["warnings"]:
        say(f"  note: {line}")
    for entry in result["excluded"][:8]:
        say(f"  left out {entry['count']}: {entry['need']}: {entry['reason']} ({entry['example']})")
    say(f"  {result['bounded']} shapes bounded, {result['searched']} searched in {result['seconds']:.1f} s")
    if result["next"]:
        say(f"  next: {result['next']}    (--to takes other engines)")
    say_explained(result, say)


def say_explained(result: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """The trace of the figure that was asked about."""
    if (why := result.get("explained")) is None:
        return
    say(f"\n{why['figure']} = {why['value']:,.6g} {why['unit']} = {why['formula']}")
    for item in why["inputs"]:
        value = item["value"]
        shown = f"{value:,.6g}" if isinstance(value, int | float) else str(value)
        say(f"  {item['name']} = {shown}: {item['source']}")


def number(value: float | None, digits: int) -> str:
    """The number with `digits` decimals; '' where there is none."""
    if value is None:
        return ""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "never done"
