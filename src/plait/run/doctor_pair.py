"""One of a few processes that try for `doctor` what takes several: `python -m plait.run.doctor_pair RANK COUNT DEVICE FOLDER`.

Every process makes the same checks in the same order, so a check that fails in all of them does not
leave anyone waiting; one that fails in some ends in the time limit of the group.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["CHECKS"]

_TIMEOUT = timedelta(seconds=30)


def main(rank: int, count: int, device: str, folder: Path) -> None:
    """Make all checks; process 0 writes `answer.json` after each."""
    if device != "cpu":
        torch.accelerator.set_device_index(rank)
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder / 'store'}", rank=rank, world_size=count, timeout=_TIMEOUT
    )
    answer = []
    mesh = init_device_mesh(device, (count,))
    for group, name, check in CHECKS:
        try:
            state, detail = "ok", check(mesh, device)
        except Exception as problem:
            state, detail = "broken", f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
        answer.append({"group": group, "name": name, "state": state, "detail": detail})
        if rank == 0:
            (folder / "answer.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


def _rows(device: str) -> torch.Tensor:
    """Of each process, its own: rank + 1 times 0, 1, 2, 3."""
    return torch.arange(4, device=device, dtype=torch.float32) * (dist.get_rank() + 1)


def _expect(found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.allclose(found, expected.to(found), rtol=1e-4, atol=1e-5):
        raise ArithmeticError(f"wrong values, off by {(found - expected.to(found)).abs().max().item():.2g}")


def _all_reduce(mesh: DeviceMesh, device: str) -> str:
    x = _rows(device)
    dist.all_reduce(x)
    _expect(x, torch.arange(4.0) * sum(range(1, mesh.size() + 1)))
    return f"{mesh.size()} processes, right sum"


def _all_gather(mesh: DeviceMesh, device: str) -> str:
    whole = torch.empty(4 * mesh.size(), device=device)
    dist.all_gather_into_tensor(whole, _rows(device))
    _expect(whole, torch.cat([torch.arange(4.0) * (rank + 1) for rank in range(mesh.size())]))
    return "right values"


def _reduce_scatter(mesh: DeviceMesh, device: str) -> str:
    whole = torch.arange(2.0 * mesh.size(), device=device) * (mesh.get_rank() + 1)
    part = torch.empty(2, device=device)
    dist.reduce_scatter_tensor(part, whole)
    start = 2 * mesh.get_rank()
    _expect(part, torch.arange(start, start + 2.0) * sum(range(1, mesh.size() + 1)))
    return "right values"


def _all_to_all(mesh: DeviceMesh, device: str) -> str:
    rank = mesh.get_rank()
    sent = torch.full((mesh.size(),), float(rank), device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    _expect(received, torch.arange(float(mesh.size())))
    return "right values"


def _send_and_receive(mesh: DeviceMesh, device: str) -> str:
    if mesh.size() == 1:
        return "one device: nobody to send to"
    rank, size = mesh.get_rank(), mesh.size()
    received = torch.empty(4, device=device)
    sends = [
        dist.P2POp(dist.isend, _rows(device), (rank + 1) % size),
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(sends):
        work.wait()
    _expect(received, torch.arange(4.0) * ((rank - 1) % size + 1))
    return "right values"


def _pipeline(mesh: DeviceMesh, device: str) -> str:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    if mesh.size() == 1:
        return "one device: no pipeline"
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4).to(device) for _ in range(mesh.size())]
    x, y = torch.randn(8, 4, device=device), torch.randn(8, 4, device=device)
    expected = torch.autograd.grad(nn.functional.mse_loss(nn.Sequential(*layers)(x), y), layers[0].weight)[0]
    rank = mesh.get_rank()
    stage = PipelineStage(layers[rank], rank, mesh.size(), torch.device(device))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
    if rank == 0:
        schedule.step(x)
        gradient = layers[0].weight.grad
        assert gradient is not None
        _expect(gradient, expected)
    else:
        schedule.step(target=y)
    dist.barrier()
    return "1F1B over the processes: right gradients"


def _sharded(mesh: DeviceMesh, device: str) -> str:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    first = nn.Linear(4, 6)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(6, 4)).to(device)
    x = torch.randn(4, 4, device=device)
    expected = torch.autograd.grad(model(x).square().mean(), first.weight)[0]
    fully_shard(model, mesh=mesh)
    model(x).square().mean().backward()
    gradient = first.weight.grad
    assert isinstance(gradient, DTensor)
    _expect(gradient.full_tensor(), expected)
    return "FSDP2: right gradients"


def _view_of_sharded(mesh: DeviceMesh, device: str) -> str:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    x = torch.arange(96.0, device=device).reshape(12, 8)
    sharded = distribute_tensor(x, mesh, [Shard(1)])
    try:
        viewed = sharded.view(-1, 6)
    except RuntimeError:
        return "refused rather than wrong (pytorch#179502)"
    assert isinstance(viewed, DTensor)
    _expect(viewed.full_tensor(), x.view(-1, 6))
    return "right values (pytorch#179502)"


CHECKS: list[tuple[str, str, Callable[[DeviceMesh, str], str]]] = [
    ("", "all-reduce", _all_reduce),
    ("", "all-gather", _all_gather),
    ("", "reduce-scatter", _reduce_scatter),
    ("", "all-to-all", _all_to_all),
    ("", "send and receive", _send_and_receive),
    ("", "pipeline", _pipeline),
    ("", "sharded parameters", _sharded),
    ("known defects", "DTensor view of a sharded dim", _view_of_sharded),
]

if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
