"""`plait verify` over architectures and plans: what holds, what is refused and why, what fails.

    python benchmarks/parity.py                      # the matrix of docs/parity.md
    python benchmarks/parity.py --set wide           # about sixty further transformers types, fewer plans
    python benchmarks/parity.py --only llama,t5 --plans tp=2,pp=2

Processes stay between cases, so that torch and transformers are imported once. Results are added to
`results/parity.jsonl` as they come (`--keep` skips those that are there), the table of all of them is written to `docs/parity.md`.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from architectures import NAMED, WIDE, small

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "parity.jsonl"
PAGE = ROOT / "docs" / "parity.md"

PLANS = ("dp=2", "fsdp=2", "tp=2", "pp=2", "dp=2;pp=2", "tp=2;pp=2", "fsdp=2;tp=2")
EIGHT = "dp=2;tp=2;pp=2"
BATCH = 8

ON_EIGHT = ("gpt2", "llama", "mixtral", "bert", "t5", "vit")
EXAMPLES = {
    "examples/digits.py:job": {},
    "examples/gpt.py:job?layers=2&width=32&heads=4&length=16": {},
    "examples/vit_digits.py:job?layers=2&width=32": {},
    "examples/resnet_digits.py:job?width=4": {},
    "examples/dlrm.py:job?tables=4&rows=50&samples=200": {},
    "examples/encoder_decoder.py:job?layers=1&width=32&samples=64": {},
    "examples/unet.py:job?width=4&samples=32": {},
}


def run_case(target: str, plan: str, batch: int, steps: int) -> dict[str, Any]:
    """One verify, in each of the workers."""
    import torch.distributed as dist

    from plait.capture.target import load_target
    from plait.errors import RequestError
    from plait.run.verify import verify

    begin = time.monotonic()
    try:
        verdict = verify(load_target(target), plan, batch=batch, steps=steps)
        result = {
            "result": "held" if verdict.ok else "FAILED",
            "loss": verdict.max_loss_diff,
            "grad": verdict.max_grad_rel_err,
            "param": verdict.max_param_rel_err,
            "captured": verdict.captured,
            "cause": "" if verdict.ok else f"{verdict.worst[:2]} {verdict.notes}",
        }
    except RequestError as problem:
        # Results are kept: without this machine's paths.
        cause = str(problem).replace(f"{sysconfig.get_path('purelib')}/", "").replace(f"{Path.cwd()}/", "")
        result = {"result": "refused", "cause": cause}
    except Exception as problem:
        import traceback

        result = {"result": "FAILED", "cause": f"{type(problem).__name__}: {problem}", "trace": traceback.format_exc()}
        if dist.is_initialized():  # so that the others, in a collective, hear of it
            dist.destroy_process_group()
    return {**result, "seconds": round(time.monotonic() - begin, 1)}


def _one_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the processes' results the one that says most: an error that is no broken connection to another."""

    def order(result: dict[str, Any]) -> tuple[bool, bool]:
        return result["result"] == "held", "onnection" in result["cause"]

    return min(results, key=order)


def cases(which: str, only: list[str], plans: list[str]) -> Iterator[tuple[str, str, str]]:
    """(name, target, plan)."""
    types = {"main": NAMED, "wide": WIDE, "all": [*NAMED, *WIDE]}.get(which, [])
    chosen = [t for t in types if not only or t in only] or (only if which == "main" else [])
    for model_type in chosen:
        if model_type.endswith(".py") or ":" in model_type:
            continue
        target = small(model_type)
        wanted = [*PLANS, EIGHT] if model_type in ON_EIGHT else PLANS
        for plan in plans or wanted:
            yield f"hf:{model_type}", target, plan.replace(";", ",")
    if which in ("main", "all", "examples"):
        for target in EXAMPLES:
            name = target.partition(":")[0]
            if only and name not in only and Path(name).stem not in only:
                continue
            for plan in plans or PLANS:
                yield name, target, plan.replace(";", ",")


def write_page(rows: Iterable[dict[str, Any]]) -> None:
    """docs/parity.md: one line a model, one column a plan."""
    latest = {(row["name"], row["plan"]): row for row in rows}
    plans = [p.replace(";", ",") for p in (*PLANS, EIGHT)]
    names = list(dict.fromkeys(name for name, _ in latest))
    lines = [
        "# What `plait verify` says",
        "",
        "Each entry is one `plait verify` in fp32: the largest relative error (by norm) of any parameter's gradient at the first step",
        "and of any parameter after the last, against one device, at most 1e-5. Written by `benchmarks/parity.py`.",
        "",
        "| model | " + " | ".join(f"`{p}`" for p in plans) + " |",
        "|---|" + "---|" * len(plans),
    ]
    causes: dict[str, list[str]] = {}
    for name in names:
        cells = []
        for plan in plans:
            row = latest.get((name, plan))
            if row is None:
                cells.append("")
            elif row["result"] == "held":
                cells.append(f"{max(row['grad'], row['param']):.0e}")
            else:
                cells.append(row["result"])
                first = row["cause"].splitlines()[0] if row["cause"] else ""
                causes.setdefault(first, []).append(f"{name} {plan}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    held = sum(row["result"] == "held" for row in latest.values())
    refused = sum(row["result"] == "refused" for row in latest.values())
    lines += ["", f"{len(latest)} cases: {held} hold, {refused} are refused, {len(latest) - held - refused} fail."]
    if causes:
        lines += ["", "## Refused and failed, by cause", ""]
        lines += [f"- {cause}: {', '.join(where)}" for cause, where in causes.items()]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Run cases and write the table."""
    from plait.errors import PlaitError
    from plait.run.processes import Workers
    from plait.schema import Plan

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="main", choices=("main", "wide", "all", "examples"))
    parser.add_argument("--only", default="", help="model types or example names, by comma")
    parser.add_argument("--plans", default="", help="plans, separated by spaces")
    parser.add_argument("--targets", default="", help="instead of a set: whole targets, separated by spaces")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--keep", action="store_true", help="skip cases whose latest result holds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    options.results.parent.mkdir(exist_ok=True)
    old = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    held = {(row["target"], row["plan"]) for row in old if row["result"] == "held"}
    only, plans = [o for o in options.only.split(",") if o], options.plans.split()
    todo: Iterable[tuple[str, str, str]] = cases(options.set, only, plans)
    if options.targets:
        todo = [(t.partition("?")[0], t, p) for t in options.targets.split() for p in plans or ["dp=1"]]
    most = 8 if EIGHT in plans or not plans else max(Plan.parse(p.replace(";", ",")).devices for p in plans)
    broken: set[str] = set()
    with Workers(most, threads=1) as workers, options.results.open("a") as file:
        for name, target, plan in todo:
            if (options.keep and (target, plan) in held) or target in broken:
                continue
            devices = Plan.parse(plan).devices
            begin = time.monotonic()
            try:
                row = _one_of(
                    workers.call(
                        run_case, target, plan, options.batch, options.steps, devices=devices, timeout=options.timeout
                    )
                )
            except PlaitError as problem:
                row = {"result": "FAILED", "cause": problem.message, "seconds": round(time.monotonic() - begin, 1)}
            if plan == "dp=1" and row["result"] != "held":
                broken.add(target)  # one process is enough to see it
            row = {"name": name, "target": target, "plan": plan, "batch": options.batch, **row}
            figures = f"{max(row['grad'], row['param']):.0e}" if "grad" in row else ""
            print(
                f"{row['result']:8} {row['seconds']:6} s  {name:28} {plan:16} {figures}{'' if row.get('captured', True) else ' own modules'} {row['cause'][:300]}",
                flush=True,
            )
            file.write(json.dumps(row) + "\n")
            file.flush()
    if options.results == RESULTS and not options.targets:
        write_page(json.loads(line) for line in options.results.read_text().splitlines())


if __name__ == "__main__":
    main()
