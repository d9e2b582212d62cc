"""The chosen threads and cores against the defaults, in turns on one computer.

    python benchmarks/placement.py export                     once: the artefacts that are served, under runs/placement
    python benchmarks/placement.py [--ways "train 1;serve 1"] [--rounds 5] [--steps 12] [-o benchmarks/results/placement.md]

Contenders, each in processes of its own that sleep while another works:

    chosen    `plait.hardware.placement`: threads by the probe's curve, cores of their own while there are enough
    unpinned  the same threads on any core
    bound     chosen, and every OpenMP thread kept to one core (OMP_PLACES, OMP_PROC_BIND); with more processes than
              cores, every process kept to one core, dealt out in turn (rank modulo cores)
    blocks    more processes than cores only: every process kept to one core, neighbours in rank on the same one
    torch     the runtime alone: as many threads as cores in every process, on any core
    torchrun  OMP_NUM_THREADS=1, which torchrun sets where several processes share a node; on any core

A round builds the run anew, warms it up, and times `--steps` steps (training of a small GPT) or 1.5 s of forwards (serving:
independent processes at the same time, a batch of one, the model in eager or an exported artefact). A ratio is the default's time over the chosen one's, round by round.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from plait.errors import WorkerError
from plait.hardware.placement import Placement, places_here
from plait.hardware.probe import load_probe
from plait.run.processes import Workers

TARGET = "examples/gpt.py:job?layers=4&width=256&length=64"
BATCH = 16
# way -> (processes, plan; empty: serving)
WAYS = {
    "train 1": (1, "dp=1"),
    "serve 1": (1, ""),
    "train 2, dp=2": (2, "dp=2"),
    "train 2, pp=2": (2, "pp=2,microbatches=4"),
    "serve 2": (2, ""),
    "train 4, dp=4": (4, "dp=4"),
    "train 4, dp=2,pp=2": (4, "dp=2,pp=2,microbatches=4"),
    "serve 4": (4, ""),
    "train 4, tp=2,pp=2": (4, "tp=2,pp=2,microbatches=4"),
    "train 4, pp=4": (4, "pp=4,microbatches=4"),
    "train 4, tp=4": (4, "tp=4"),
    "serve 1, onnxruntime": (1, ""),
    "serve 2, onnxruntime": (2, ""),
    "serve 1, openvino": (1, ""),
    "serve 2, openvino": (2, ""),
}
ROOT = Path(__file__).resolve().parent.parent
ARTEFACTS = ROOT / "runs" / "placement"
LIMIT = 30.0  # s, for building, warming up and timing one round
READY, SERVED = 2.5, 1.5  # s, until every server has loaded its model and is warm, and while they are timed
CONTENDERS = ("chosen", "torch", "torchrun", "unpinned", "bound", "blocks")


def placements(contender: str, processes: int) -> tuple[Placement, ...]:
    chosen = places_here(processes, {})
    cores = os.cpu_count() or 1
    free = Placement(threads=1, cpus=(), places=(), memory=(), reason="")
    match contender:
        case "unpinned":
            return tuple(replace(one, cpus=(), places=()) for one in chosen)
        case "torch":
            return (replace(free, threads=cores),) * processes
        case "torchrun":
            return (free,) * processes
        case "bound" if processes > cores:
            return tuple(replace(free, cpus=(rank % cores,)) for rank in range(processes))
        case "blocks" if processes > cores:
            return tuple(replace(free, cpus=(rank * cores // processes,)) for rank in range(processes))
        case _:
            return chosen


class Contender(Workers):
    """Workers under other placements than the chosen ones; `bound` sets OpenMP's own variables beside."""

    def __init__(self, contender: str, processes: int) -> None:
        super().__init__(processes, threads=1)
        self._placements = tuple(replace(one, reason="") for one in placements(contender, processes))
        self._bound = contender == "bound"

    def _start(self) -> None:
        names = ("OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY")
        if self._bound:
            # One set of variables serves all: OpenMP takes the places that lie within the process's own cores.
            os.environ.update(OMP_PROC_BIND="close", OMP_PLACES="cores")
        try:
            super()._start()
        finally:
            for name in names:
                os.environ.pop(name, None)


def train(plan: str, steps: int) -> float:
    """Median seconds of a step in this process."""
    from plait.capture import batch as batches
    from plait.capture.target import load_target
    from plait.run.start import start

    job = load_target(TARGET)
    inputs, targets = batches.resized(job, BATCH)
    seconds = []
    with start(job, plan, batch=BATCH) as run:
        for step in range(steps + 3):
            begin = time.perf_counter()
            run.step(inputs, targets)
            if step >= 3:  # the first steps fill buffers
                seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def serve(begin: float) -> float:
    """Median seconds of a forward of one sample in this process, the others working beside it."""
    from plait.capture.target import load_target

    torch.manual_seed(0)
    job = load_target(TARGET)
    model = job.model if isinstance(job.model, torch.nn.Module) else job.model()
    inputs = job.batch[0][:1]
    with torch.inference_mode():
        return together(lambda: model(inputs), begin)


def serve_artefact(runtime: str, begin: float) -> float:
    """The same of an exported artefact. Its threads are those that `load` takes under the contender's OMP_NUM_THREADS."""
    from plait.serve.served import load

    served = load(ARTEFACTS / runtime)
    inputs = torch.zeros(1, 64, dtype=torch.int64)
    return together(lambda: served(inputs), begin)


def together(call: Callable[[], object], begin: float) -> float:
    """Median seconds of a call from a time of day on, until which all processes call it, too."""
    seconds = []
    while (now := time.time()) < begin + SERVED:
        start = time.perf_counter()
        call()
        if now >= begin:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def export() -> None:
    """The artefacts of the ways that serve one."""
    import plait

    report = plait.export(
        TARGET, "onnxruntime,openvino", output=ARTEFACTS, batch=1, threads=1, seconds=0, compiled=False
    )
    print(*(f"{row['backend']} {row['status']} {row.get('error', '')}" for row in report["rows"]), sep="\n")


def race(way: str, names: list[str], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of the slowest process by contender and round."""
    processes, plan = WAYS[way]
    runtime = way.partition(", ")[2]
    found: dict[str, list[float]] = {name: [] for name in names}
    teams = {name: Contender(name, processes) for name in names}
    try:
        for number in range(rounds + 1):
            # Another order each time, so that none always follows the same neighbour.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                begin = time.time() + READY
                call = (train, plan, steps) if plan else (serve_artefact, runtime, begin) if runtime else (serve, begin)
                try:
                    seconds = max(teams[name].call(*call, timeout=LIMIT))
                except WorkerError as problem:
                    if "time limit" not in str(problem):
                        raise
                    seconds = math.inf  # beyond every limit: its processes spin while they wait for each other
                if number:  # the first round loads libraries
                    found[name].append(seconds)
    finally:
        for team in teams.values():
            team.__exit__(None, None, None)
    return found


def ratios(found: dict[str, list[float]], name: str, base: str = "chosen") -> str:
    values = sorted(other / own for other, own in zip(found[name], found[base], strict=True))
    if values[-1] == math.inf:
        return f"not done in {LIMIT:g} s ({sum(map(math.isinf, values))} of {len(values)} rounds)"
    return f"{statistics.median(values):.2f} [{values[0]:.2f}, {values[-1]:.2f}]"


def row(way: str, names: list[str], found: dict[str, list[float]]) -> str:
    chosen = places_here(WAYS[way][0], {})[0]
    own = f"{1e3 * statistics.median(found['chosen']):.2f}"
    cells = [ratios(found, name) if name in found else "" for name in names if name != "chosen"]
    cores = ",".join(map(str, chosen.cpus)) or "any"
    return f"| {way} | {chosen.threads} | {cores} | {own} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["export"])
    parser.add_argument(
        "--contenders", default=",".join(CONTENDERS), help="separated by commas, with chosen among them"
    )
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "PLAIT_PIN"):
        os.environ.pop(name, None)
    if arguments.what == "export":
        export()
        return
    names = arguments.contenders.split(",")
    probe = load_probe()
    if probe is None:
        raise SystemExit("run `plait hardware probe` first: the choice is made from it")
    where = f"{platform.machine()}, {probe.processor}, {probe.cores} cores, torch {torch.__version__}, gloo"
    lines = [
        f"{where}; {arguments.rounds} rounds of {arguments.steps} steps; {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}.",
        "",
        f"| way | threads | cores of process 0 | ms chosen | {' | '.join(name for name in names if name != 'chosen')} |",
        f"|{'---|' * (3 + len(names))}",
    ]
    print("\n".join(lines), flush=True)
    for way in arguments.ways.split(";"):
        processes = WAYS[way][0]
        racing = [name for name in names if name != "blocks" or processes > (os.cpu_count() or 1)]
        lines.append(row(way, names, race(way, racing, arguments.rounds, arguments.steps)))
        print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
