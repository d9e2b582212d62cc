"""Which architectures tensor parallelism gets right, and how much of them it splits.

    python benchmarks/tensor_parallel_sweep.py [--tp 2] [TYPE ...]

Each small model is captured, lowered for every rank of a gloo group, and one step is compared with the unmodified
model: loss and every gradient by norm, whole parameters bit for bit between ranks. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "run" / "shard"))

import harness
from architectures import NAMED, TENSOR_PARALLEL_ONLY, WIDE

TYPES = [*NAMED, *WIDE, *TENSOR_PARALLEL_ONLY]


def counts(found: dict[str, int]) -> str:
    """All-reduces and all-gathers of one pass."""
    return f"{found.get('all_reduce', 0)} + {found.get('all_gather', 0)}"


def line(case: str, outcomes: list[Any]) -> str:
    """One row of the table."""
    problem = next((o.problem for o in outcomes if o.problem), "")
    if problem:
        return f"| {case} | failed | | | | | {problem.strip().splitlines()[-1][:90]} |"
    worst = max(outcomes, key=lambda o: o.gradient_error)
    verdict = "exact" if all(o.is_exact for o in outcomes) else f"WRONG {worst.worst}"
    return (
        f"| {case} | {verdict} | {worst.gradient_error:.1e} | {worst.sharded:.0%} | {counts(worst.forward)} "
        f"| {counts(worst.backward)} | {'; '.join(w.split(':')[0].split('.', 1)[-1] for w in worst.whole[:3])} |"
    )


def main() -> None:
    """Run the cases one after the other in processes that stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("types", nargs="*", default=TYPES)
    options = parser.parse_args()
    print("| type | result | worst gradient | parameters split | forward reduce + gather | backward | whole |")
    print("|---|---|---|---|---|---|---|")
    workers = harness.Workers(options.tp)
    for kind in options.types:
        case = kind if kind.startswith("model:") else f"hf:{kind}"
        try:
            print(line(kind, workers.run(case.removeprefix("model:"), timeout=240)), flush=True)
        except TimeoutError as problem:
            print(f"| {kind} | failed | | | | | {str(problem).strip().splitlines()[-1][:90]} |", flush=True)
            workers = harness.Workers(options.tp)
    workers.close()


if __name__ == "__main__":
    main()
