"""The processes of a run: who this one is, its device, and the groups it talks in."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from plait.errors import PlanError, WorkerError
from plait.schema import Plan

__all__ = ["TIMEOUT", "World", "join"]

TIMEOUT = datetime.timedelta(seconds=float(os.environ.get("PLAIT_TIMEOUT_S", "1800")))
"""The longest a process waits in a collective before it gives up."""

MESH = ("pp", "dp", "fsdp", "tp")
"""Slowest to fastest: neighbours in rank share the axis that talks the most."""


@dataclass
class World:
    """This process among the plan's devices."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    """Axes of MESH; None when alone."""

    def index(self, axis: str) -> int:
        """This process's coordinate on an axis."""
        return 0 if self.mesh is None else int(self.mesh.get_local_rank(axis))

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The processes that differ from this one on one axis only; None when there are no others."""
        if self.mesh is None or self.mesh[axis].size() == 1:
            return None
        return self.mesh.get_group(axis)

    @property
    def replica(self) -> int:
        """Which share of the samples is this process's: its place on dp x fsdp."""
        fsdp = 1 if self.mesh is None else self.mesh["fsdp"].size()
        return self.index("dp") * fsdp + self.index("fsdp")

    @cached_property
    def samples(self) -> dist.ProcessGroup | None:
        """The processes that work on other samples: dp x fsdp."""
        if self.mesh is None:
            return None
        mesh: DeviceMesh = self.mesh["dp", "fsdp"]
        return mesh._flatten("samples").get_group() if mesh.size() > 1 else None

    def ranks_of_stages(self, stages: list[int]) -> list[list[int]]:
        """For each place on the other axes, the global ranks of some pipeline ranks; the same list everywhere."""
        assert self.mesh is not None
        ranks = self.mesh.mesh.reshape(self.mesh["pp"].size(), -1)
        return [[int(ranks[stage, column]) for stage in stages] for column in range(ranks.shape[1])]


def join(plan: Plan) -> World:
    """This process's place in the plan; joins the process group that torchrun or plait's launcher prepared.

    Raises:
        PlanError: the plan's devices are not the processes that are there.
    """
    device = pick_device()
    if plan.devices == 1:
        return World(0, 1, device, None)
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise PlanError(
                f"plan: it needs {plan.devices} processes, this is one alone",
                hint="start with `plait train ... --devices N`, torchrun, or plait.spawn(function, devices=N)",
            )
        backend = dist.get_default_backend_for_device(device.type)
        try:
            dist.init_process_group(backend, timeout=TIMEOUT, **rendezvous())
        except (dist.DistNetworkError, dist.DistStoreError) as problem:
            raise _cannot_meet(problem) from None
    size = dist.get_world_size()
    if size != plan.devices:
        raise PlanError(f"plan: it needs {plan.devices} devices, {size} processes are there")
    mesh = init_device_mesh(device.type, (plan.pp, plan.dp, plan.fsdp, plan.tp), mesh_dim_names=MESH)
    return World(dist.get_rank(), size, device, mesh)


def _cannot_meet(problem: Exception) -> WorkerError:
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    return WorkerError(
        f"process {os.environ['RANK']}: cannot meet the others at {place}: {str(problem).splitlines()[0]}",
        hint="if the port is in use, choose another (torchrun --master-port, or --rdzv-endpoint); if the address is "
        "wrong or a process is missing, start them all with the same MASTER_ADDR and MASTER_PORT",
    )


def rendezvous() -> dict[str, Any]:
    """plait's own processes meet in a file, which needs no free port; torchrun's by its environment."""
    path = os.environ.get("PLAIT_STORE")
    if path is None:
        return {}
    size = int(os.environ["WORLD_SIZE"])
    return {"store": FileStore(path, size), "rank": int(os.environ["RANK"]), "world_size": size}


def pick_device() -> torch.device:
    """This process's accelerator by local rank, else the CPU (`PLAIT_DEVICE=cpu` forces that)."""
    wish = os.environ.get("PLAIT_DEVICE", "")
    if wish == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)
