"""Measures one of several processes of this computer that work at the same time: `python -m plait.hardware.together`.

Started by `plait.hardware.probe_group`, as rank R of P, one process a rank. Rank 0 prints one JSON object: by name, the
repetitions. Each process does the same as the others at the same moment, as it will in training:

    kernels      a window of time in which every process repeats one kernel: how often, by its own seconds
    collectives  piece of compute, collective, piece of compute, ...: against the same without collectives

Where processes share cores, seconds of a core and not of the clock say what a kernel costs: they hold whichever process
has the core meanwhile, and what sharing caches and changing between processes adds is in them.

A collective is measured between pieces of compute because processes that share cores do not arrive together: the wait
for the last one, and for a core once it came, is part of what a collective costs there.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["KERNELS", "KERNELS_RUN", "MESSAGES", "WORK", "main", "usable_cores"]

_SCORES = 2.0 * 2 * 4 * 256 * 256 * 64  # FLOP of one of attention's products, in full
_MOVED = (2 + 2 + 3) * 4.0 * 512 * 768  # bytes: inputs and outputs of a norm, a GELU and an addition
MESSAGES = (4096, 1 << 17, 1 << 20, 8 << 20)
"""Bytes of the whole tensor that a collective gathers, reduces or sends."""
KERNELS = (
    "matmul",
    "thin_matmul",
    "attention",
    "attention_back",
    "elementwise",
    "elementwise_back",
    "kernel",
    "optimizer",
)
"""What is measured; `WORK` says of how much."""
WORK = {
    "matmul": (2.0 * 512**3, 4.0 * 3 * 512**2),  # FLOP, bytes
    "thin_matmul": (2.0 * 16 * 1024**2, 4.0 * (1024**2 + 2 * 16 * 1024)),
    "attention": (2 * _SCORES, 0.0),
    "attention_back": (5 * _SCORES, 0.0),
    "elementwise": (0.0, _MOVED),
    "elementwise_back": (0.0, 1.5 * _MOVED),
    "kernel": (0.0, 0.0),
    "optimizer": (0.0, 24.0 * (1 << 21)),
}
"""(FLOP, bytes) of one run of each kernel, as the cost model counts them."""
KERNELS_RUN = 10 * 2 + 10 * 3
"""Operators in one run of `kernel`: forward two in each layer; backward two for the linear one, one for the other."""
_WINDOW = 0.2  # s
_ROUNDS = 4
_PIECE = 576  # rows of the square matmul between two collectives: a few milliseconds

Action = Callable[[], Any]


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(rank: int, count: int, threads: int, store: str, groups: tuple[int, ...]) -> dict[str, list[float]]:
    """Every figure's repetitions, in this process (the same in every process where all take part)."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=datetime.timedelta(seconds=40)
    )
    found: dict[str, list[float]] = {}
    crowded = count * threads > usable_cores()
    for name, action in _kernels(torch).items():
        found[name] = [_window(dist, torch, action, by_core=crowded) for _ in range(_ROUNDS)]
    for size in groups:
        mine = None
        for first in range(0, count, size):  # every process makes every group, as torch wants it
            made = dist.new_group(list(range(first, first + size)))
            mine = made if first <= rank < first + size else mine
        found |= _collectives(dist, torch, mine, size, rank)
    dist.barrier()
    dist.destroy_process_group()
    return found


def _window(dist: Any, torch: Any, action: Action, *, by_core: bool) -> float:
    """Seconds (of a core, where `by_core`) that one `action` takes while all processes repeat it, mean over processes."""
    action()
    dist.barrier()
    count, begin, busy = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < _WINDOW:
        action()
        count += 1
    spent = time.process_time() - busy if by_core else time.perf_counter() - begin
    mean = torch.tensor([spent / count], dtype=torch.float64)
    dist.all_reduce(mean)
    return float(mean) / int(dist.get_world_size())


def _kernels(torch: Any) -> dict[str, Action]:
    """One run of each kernel (`WORK`)."""
    from torch.nn import functional

    a, b, out = torch.randn(512, 512), torch.randn(512, 512), torch.empty(512, 512)
    thin, wide, thin_out = torch.randn(16, 1024), torch.randn(1024, 1024), torch.empty(16, 1024)
    q, k, v = (torch.randn(2, 4, 256, 64, requires_grad=True) for _ in range(3))
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    seed = torch.randn_like(attended)
    x, norm = torch.randn(512, 768, requires_grad=True), torch.nn.LayerNorm(768)

    def attend() -> None:
        with torch.no_grad():
            functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def pointwise() -> Any:
        return functional.gelu(norm(x)) + x

    def pointwise_alone() -> None:
        with torch.no_grad():
            pointwise()

    y, back = pointwise(), torch.randn(512, 768)
    w = torch.randn(8, 8, requires_grad=True)

    def small() -> None:
        z = w
        for _ in range(10):
            z = torch.tanh(functional.linear(z, w))
        z.sum().backward()

    parameters = [torch.nn.Parameter(torch.randn(1 << 17)) for _ in range(16)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    adam = torch.optim.AdamW(parameters)
    return {
        "matmul": lambda: torch.mm(a, b, out=out),
        "thin_matmul": lambda: torch.mm(thin, wide, out=thin_out),
        "attention": attend,
        "attention_back": lambda: torch.autograd.grad(attended, (q, k, v), seed, retain_graph=True),
        "elementwise": pointwise_alone,
        "elementwise_back": lambda: torch.autograd.grad(y, [x, *norm.parameters()], back, retain_graph=True),
        "kernel": small,
        "optimizer": adam.step,
    }


def _collectives(dist: Any, torch: Any, group: Any, size: int, rank: int) -> dict[str, list[float]]:
    """`KIND/ranks=N/BYTES` and `KIND_core/...`: seconds, and seconds of a core in each process, beyond the compute's."""
    a, out = torch.randn(_PIECE, _PIECE), torch.empty(_PIECE, _PIECE)
    first = rank // size * size
    partner = rank + 1 if rank % 2 == 0 else rank - 1

    def piece() -> None:
        torch.mm(a, a, out=out)

    def actions(nbytes: int) -> dict[str, Action]:
        whole = torch.ones(max(size, nbytes // 4 // size * size))
        part = torch.ones(whole.numel() // size)
        message = torch.ones(nbytes // 4)
        kinds: dict[str, Action] = {
            "all_reduce": lambda: dist.all_reduce(whole, group=group),
            "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        }
        if size == 2:
            send, receive = (dist.send, dist.recv) if rank == first else (dist.recv, dist.send)

            def both_ways() -> None:
                send(message, partner)
                receive(message, partner)

            kinds["send"] = both_ways
        return kinds

    found: dict[str, list[float]] = {}
    for nbytes in MESSAGES:
        for kind, action in actions(nbytes).items():
            walls, cores = [], []
            for _ in range(_ROUNDS):
                wall, core = _difference(dist, torch, piece, action)
                walls.append(wall / (2 if kind == "send" else 1))
                cores.append(core / (2 if kind == "send" else 1))
            found[f"{kind}/ranks={size}/{nbytes}"] = walls
            found[f"{kind}_core/ranks={size}/{nbytes}"] = cores
    return found


def _difference(dist: Any, torch: Any, piece: Action, action: Action) -> tuple[float, float]:
    """(seconds, seconds of a core in each process) that one `action` adds to pieces of compute around it.

    Where the difference is lost in the noise, what the actions take without compute in between.
    """
    plain = _loop(dist, torch, (piece,))
    full = _loop(dist, torch, (piece, action))
    alone = _loop(dist, torch, (action,))
    return max(full[0] - plain[0], alone[0]), max(full[1] - plain[1], alone[1])


def _loop(dist: Any, torch: Any, actions: tuple[Action, ...], turns: int = 5) -> tuple[float, float]:
    """(seconds of the slowest process, mean seconds of a core) of one turn."""
    dist.barrier()
    busy, begin = time.process_time(), time.perf_counter()
    for _ in range(turns):
        for action in actions:
            action()
    wall, busy = time.perf_counter() - begin, time.process_time() - busy
    slowest = torch.tensor([wall], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    mean = torch.tensor([busy], dtype=torch.float64)
    dist.all_reduce(mean)
    return float(slowest) / turns, float(mean) / dist.get_world_size() / turns


if __name__ == "__main__":
    _rank, _count, _threads = (int(text) for text in sys.argv[1:4])
    _found = main(_rank, _count, _threads, sys.argv[4], tuple(json.loads(sys.argv[5])))
    if _rank == 0:
        sys.stdout.write(json.dumps(_found) + "\n")
