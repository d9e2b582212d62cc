"""What engines call an accelerator: instance types, resource names, labels, each with its source in data/names.csv."""

from __future__ import annotations

import functools
from pathlib import Path

from plait.errors import HardwareError
from plait.hardware.catalogue import Accelerator
from plait.hardware.tables import rows
from plait.jobs.request import Request

__all__ = ["counts_of", "cpu_machine", "name_of", "need_name", "resource_of"]

TABLE = Path(__file__).parent / "data" / "names.csv"


@functools.cache
def _names() -> dict[tuple[str, str, str], str]:
    """(part, engine, count or nothing) -> the engine's name."""
    return {
        (cells["part"], cells["engine"], cells["count"]): cells["name"]
        for _, cells in rows(TABLE, ("part", "engine", "count", "name", "source"))
    }


def name_of(part: Accelerator, engine: str, count: int | None = None) -> str | None:
    """The engine's name for `count` of a part (for the part itself if None); None: no source says."""
    return _names().get((part.name, engine, "" if count is None else str(count)))


def counts_of(part: Accelerator, engine: str) -> dict[int, str]:
    """Every count that the engine offers of a part, with its name."""
    return {int(n): name for (p, e, n), name in _names().items() if (p, e) == (part.name, engine) and n}


_TOLD = {"aws": "AWS", "azure": "Azure", "tpu-type": "Google Cloud TPU", "skypilot": "SkyPilot"}
"""Engines' words in names.csv, as people call them."""


def need_name(request: Request, engine: str, count: int | None, option: str) -> str:
    """The engine's name for the request's part.

    Raises:
        HardwareError: none is known; says what the engine has, and the option that names one by hand.
    """
    assert request.part is not None
    found = name_of(request.part, engine, count)
    if found is not None:
        return found
    told = _TOLD.get(engine, engine)
    offered = counts_of(request.part, engine)
    others = sorted({p for p, e, _ in _names() if e == engine})
    if offered:
        sizes = ", ".join(f"{n} ({name})" for n, name in sorted(offered.items()))
        raise HardwareError(
            f"launch: {told} has {'no slice of' if engine == 'tpu-type' else 'no machine with'} {count} {request.part.name}",
            hint=f"it has {sizes}; "
            + (f"take {option}" if engine == "tpu-type" else f"change --devices-per-node, or {option}"),
        )
    raise HardwareError(
        f"launch: no name of {request.part.name} is known for {told}",
        hint=f"{option}; it is known for {', '.join(others[:8])}" + (", ..." if len(others) > 8 else ""),
    )


_CPU_MACHINES = {
    # cores (two vCPU each) -> size. Sources: AWS, "Amazon EC2 C7i instances"; Azure, "Dsv5 sizes series"; both read 2026-11.
    "aws": {8: "c7i.4xlarge", 16: "c7i.8xlarge", 24: "c7i.12xlarge", 32: "c7i.16xlarge", 48: "c7i.24xlarge",
            96: "c7i.48xlarge"},
    "azure": {8: "Standard_D16s_v5", 16: "Standard_D32s_v5", 24: "Standard_D48s_v5", 32: "Standard_D64s_v5",
              48: "Standard_D96s_v5"},
}  # fmt: skip


def cpu_machine(request: Request, cloud: str) -> str:
    """The cloud's smallest machine (of eight cores at least) with a core for every thread of a node.

    Raises:
        HardwareError: none is so large.
    """
    sizes = _CPU_MACHINES[cloud]
    for cores, name in sizes.items():
        if cores >= request.cores:
            return name
    raise HardwareError(
        f"launch: {request.devices_per_node} processes need {request.cores} cores in a node, {cloud}'s largest has {max(sizes)}",
        hint="spread them over more --nodes",
    )


def resource_of(part: Accelerator) -> str:
    """The resource by which Kubernetes counts a part.

    Raises:
        HardwareError: the vendor's device plugin is not known.
    """
    keys = (f"vendor {part.vendor} {part.device.torch_device}", f"vendor {part.vendor}")
    for key in keys:
        if (found := _names().get((key, "kubernetes", ""))) is not None:
            return found
    raise HardwareError(
        f"launch: Kubernetes' resource name of {part.name} is not known",
        hint="write the files for another --gpu-type and change the resource by hand",
    )
