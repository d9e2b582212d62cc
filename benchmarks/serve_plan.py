"""Serving under plans beside the plain model on one device: outputs, latency and throughput, taken in turn.

    python benchmarks/serve_plan.py [--seconds 4] [--threads 1] [-o benchmarks/results/serve_plan.json]

Every plan has its processes at the same time as the plain model's one; they compute in turn, batch by batch, so that
what else goes on on the machine meets all of them. The pipeline is measured with one microbatch, and with several in flight.
On one computer a plan splits the same cores' work: its ratio says what the plan costs, not what more devices would gain.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import plait
from plait.capture import batch as batches
from plait.capture.inference import inference_job
from plait.capture.target import load_target
from plait.capture.trace import call_model
from plait.run.processes import Workers

LLAMA = (
    "hf:llama?num_hidden_layers=8&hidden_size=256&intermediate_size=688&num_attention_heads=8&num_key_value_heads=4"
    "&vocab_size=4096&seq_len=64"
)
VIT = "hf:vit?hidden_size=192&num_hidden_layers=8&num_attention_heads=4&intermediate_size=768"
PLANS = (
    "dp=2",
    "tp=2",
    "pp=2,microbatches=1",
    "pp=2,microbatches=2",
    "pp=2,microbatches=4",
    "fsdp=2",
    "tp=2,pp=2,microbatches=4",
)


def in_turn(target: str, plan: str, batch: int, seconds: float) -> tuple[list[float], list[float]]:
    """(plain, plan): the first process runs the plain model between the plan's forwards, while the others wait."""
    import torch.distributed as dist

    job = load_target(target)
    run = plait.start(job, plan, train=False, batch=batch)
    inputs = batches.resized(run.job, batch)[0]
    plain = None
    if run.world.rank == 0:
        torch.manual_seed(0)
        module = job.model() if not isinstance(job.model, torch.nn.Module) else job.model
        module.eval()
        served_inputs = batches.resized(inference_job(job, module), batch)[0]

        def plain() -> Any:
            with torch.no_grad():
                return call_model(module, served_inputs)

    own, ours = [], []
    stop = time.perf_counter() + seconds
    for count in range(1000):
        if plain is not None:
            begin = time.perf_counter()
            expected = plain()
            own.append(time.perf_counter() - begin)
        dist.barrier()
        begin = time.perf_counter()
        outputs = run.forward(inputs, to="first")
        ours.append(time.perf_counter() - begin)
        if count == 0 and outputs is not None:
            a, b = _first(outputs), _first(expected)
            error = float((a - b).abs().max() / b.abs().max())
            assert error < 1e-5, f"{plan}: relative error {error}"
        over = torch.tensor(float(time.perf_counter() > stop and count >= 12))
        dist.broadcast(over, 0)
        if over:
            break
    return own[2:], ours[2:]


def _first(outputs: Any) -> torch.Tensor:
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor))


def main() -> None:
    """Print and save a row for each model, batch and plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--plans", default=";".join(PLANS))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = []
    for name, target in (("llama", LLAMA), ("vit", VIT)):
        for plan in options.plans.split(";"):
            devices = plait.Plan.parse(plan).devices
            with Workers(devices, threads=options.threads) as workers:
                everyone = workers.call(in_turn, target, plan, options.batch, options.seconds, timeout=400)
            own, ours = everyone[0]
            plain_s, plan_s = statistics.median(own), statistics.median(ours)
            rows.append(
                {
                    "model": name,
                    "plan": plan,
                    "batch": options.batch,
                    "plain_ms": 1e3 * plain_s,
                    "plan_ms": 1e3 * plan_s,
                    "ratio": plan_s / plain_s,
                    "plan_p90_ms": 1e3 * sorted(ours)[int(0.9 * len(ours))],
                    "plan_samples_per_s": options.batch / plan_s,
                    "calls": len(ours),
                }
            )
            print(
                f"{name:6} {plan:28} plain {1e3 * plain_s:8.1f} ms  plan {1e3 * plan_s:8.1f} ms  ratio {plan_s / plain_s:5.2f}"
                f"  {options.batch / plan_s:8.1f} samples/s",
                flush=True,
            )
    if options.output:
        about = {
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "threads": options.threads,
            "date": time.strftime("%F"),
        }
        options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
