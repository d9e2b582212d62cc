"""plait against hand-written torch, side by side in the same processes.

    python benchmarks/overhead.py [--pairs 7] [--steps 20] [--only dp,fsdp] [-o benchmarks/results/overhead.md]

For each way of running a GPT of about 22 million parameters, both contenders are built in the same two processes and
take turns of `--steps` optimizer steps, `--pairs` times; the ratio is taken pair by pair. Bytes held in tensors are
counted in processes of their own, from the first allocation on, at their peak over three steps.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import plait
from plait.run.meter import tensor_bytes
from plait.run.processes import Workers
from plait.run.start import start

WAYS = {
    "single": ("dp=1", 1),
    "dp": ("dp=2", 2),
    "fsdp": ("fsdp=2", 2),
    "pp": ("pp=2,microbatches=4", 2),
    "tp": ("tp=2", 2),
}
LIMIT = {"tp": 1.10}
LENGTH, BATCH, WIDTH, LAYERS, HEADS, VOCAB = 64, 8, 512, 7, 8, 256


class Block(nn.Module):
    """A pre-norm transformer block with separate projections, as parallelize_module wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] -> the same."""
        y = self.norm1(x)
        # -1: under tensor parallelism each process holds a part of the heads.
        q, k, v = (p(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Token and position tables, blocks, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> logits [batch, length, VOCAB]."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_function(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over all positions."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """The same global batch in every process."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW with torch's defaults."""
    return torch.optim.AdamW(parameters, lr=3e-4)


Step = Callable[[], float]


def plait_step(way: str) -> Step:
    """One step of plait's run."""
    torch.manual_seed(0)
    job = plait.Job(GPT, loss=loss_function, optimizer=optimizer, batch=batch())
    run = start(job, WAYS[way][0])
    inputs, targets = batch()
    return lambda: run.step(inputs, targets)


def own_share() -> tuple[torch.Tensor, torch.Tensor]:
    """This process's half of the batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs, targets = batch()
    return inputs.chunk(size)[rank], targets.chunk(size)[rank]


def plain_loop(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Step:
    """The loop that everyone writes."""
    own = optimizer(module.parameters())

    def step() -> float:
        own.zero_grad()
        loss = loss_function(module(inputs), targets)
        loss.backward()
        own.step()
        return loss.item()

    return step


def hand_single() -> Step:
    """One process, no plan."""
    return plain_loop(GPT(), *batch())


def hand_dp() -> Step:
    """DistributedDataParallel."""
    return plain_loop(nn.parallel.DistributedDataParallel(GPT()), *own_share())


def hand_fsdp() -> Step:
    """fully_shard on each block and the root."""
    from torch.distributed.fsdp import fully_shard

    model = GPT()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return plain_loop(model, *own_share())


def hand_tp() -> Step:
    """parallelize_module, the Megatron layout."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = GPT()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layout = dict.fromkeys(("q", "k", "v", "up"), ColwiseParallel()) | dict.fromkeys(("o", "down"), RowwiseParallel())
    for block in model.blocks:
        parallelize_module(block, mesh, layout)
    return plain_loop(model, *batch())


class _Half(nn.Module):
    def __init__(self, model: GPT, first: bool) -> None:
        super().__init__()
        middle = (LAYERS + 1) // 2
        self.first = first
        self.blocks = model.blocks[:middle] if first else model.blocks[middle:]
        if first:
            self.token, self.position = model.token, model.position
        else:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            x = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return x if self.first else self.head(self.norm(x))


def hand_pp() -> Step:
    """PipelineStage and Schedule1F1B over two halves."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank = dist.get_rank()
    half = _Half(GPT(), rank == 0)
    stage = PipelineStage(half, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 4, loss_fn=loss_function)
    own = optimizer(half.parameters())
    inputs, targets = batch()

    def step() -> float:
        own.zero_grad()
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets, losses=losses)
        own.step()
        return sum(loss.item() for loss in losses) / 4

    return step


HAND = {"single": hand_single, "dp": hand_dp, "fsdp": hand_fsdp, "pp": hand_pp, "tp": hand_tp}


def _join() -> None:
    from plait.run.world import rendezvous

    if int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", **rendezvous())


def race(way: str, pairs: int, steps: int) -> list[tuple[float, float, float, float]]:
    """(plait seconds, hand seconds, plait CPU seconds, hand CPU seconds) of each pair, in this process."""
    _join()
    ours, theirs = plait_step(way), HAND[way]()
    rows = []
    for _ in range(3):
        ours(), theirs()
    gc.collect()
    for pair in range(pairs):
        order = (ours, theirs) if pair % 2 == 0 else (theirs, ours)
        spent: dict[Step, tuple[float, float]] = {}
        for step in order:
            if dist.is_initialized():
                dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
            spent[step] = (time.perf_counter() - wall, time.process_time() - cpu)
        rows.append((spent[ours][0], spent[theirs][0], spent[ours][1], spent[theirs][1]))
    return rows


def held(way: str, who: str) -> tuple[int, int]:
    """(peak bytes in tensors over three steps, resident bytes at the process's peak) of one contender, in this process."""
    _join()
    step = plait_step(way) if who == "plait" else HAND[way]()
    step()
    gc.collect()
    peaks: list[int] = []
    with tensor_bytes(peaks.append):
        for _ in range(3):
            step()
    return peaks[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def spread(values: list[float]) -> str:
    """`median [lowest, highest]`."""
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    """Run the races and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("-o", type=Path, default=None)
    options = parser.parse_args()
    lines = [
        "| way | time ratio | CPU ratio | tensor bytes ratio | resident MiB plait / hand | ms a step plait / hand | limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in options.only.split(","):
        devices = WAYS[way][1]
        with Workers(devices, threads=1) as workers:
            by_rank = workers.call(race, way, options.pairs, options.steps, timeout=3000)
        time_ratios = [max(r[i][0] for r in by_rank) / max(r[i][1] for r in by_rank) for i in range(options.pairs)]
        cpu_ratios = [sum(r[i][2] for r in by_rank) / sum(r[i][3] for r in by_rank) for i in range(options.pairs)]
        per_step = [
            1e3 * statistics.median(max(r[i][k] for r in by_rank) for i in range(options.pairs)) / options.steps
            for k in (0, 1)
        ]
        memory = {}
        for who in ("plait", "hand"):
            with Workers(devices, threads=1) as workers:
                memory[who] = workers.call(held, way, who, timeout=600)
        tensors = max(m[0] for m in memory["plait"]) / max(m[0] for m in memory["hand"])
        resident = [max(m[1] for m in memory[who]) / 2**20 for who in ("plait", "hand")]
        lines.append(
            f"| {way} | {spread(time_ratios)} | {spread(cpu_ratios)} | {tensors:.3f} | "
            f"{resident[0]:.0f} / {resident[1]:.0f} | {per_step[0]:.1f} / {per_step[1]:.1f} | {LIMIT.get(way, 1.05)} |"
        )
        print(lines[-1], flush=True)
    text = (
        f"# Overhead against hand-written torch\n\nGPT of {sum(p.numel() for p in GPT().parameters()):,} parameters, "
        f"batch {BATCH} x {LENGTH} tokens; torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, one "
        f"thread a process, gloo; {options.pairs} pairs of {options.steps} steps; {datetime.datetime.now().astimezone():%Y-%m-%d}.\n"
        "Ratios are plait / hand: median [lowest, highest] over the pairs; the slowest process counts for time, all for "
        "CPU seconds.\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if options.o is not None:
        options.o.parent.mkdir(parents=True, exist_ok=True)
        options.o.write_text(text)


if __name__ == "__main__":
    main()
