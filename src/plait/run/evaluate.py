"""The loss on held-out batches, under the plan: forward only, dropout off, batch norm by its running statistics.

The captured graph is the training one. Random operators give their mean, which is what eval mode computes for dropout
and drop path, and buffers are not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from plait.capture.prelude import is_random
from plait.run.batchnorm import by_running_statistics
from plait.run.precision import autocast_for
from plait.run.randomness import NoRandomness

if TYPE_CHECKING:
    from plait.run.start import Run

__all__ = ["losses_of_parts"]


def losses_of_parts(
    run: Run, inputs: list[dict[str, Any]], targets: list[tuple[Any, float]], sizes: list[int]
) -> list[torch.Tensor]:
    """Weighted losses of this process's parts where the last stage is, else an empty list."""
    with torch.no_grad(), _eval_mode(run), autocast_for(run.plan, run.world.device):
        outputs = [_forward(run, one, size) for one, size in zip(inputs, sizes, strict=True)]
        return [run.loss_of_outputs(o, t) for o, t in zip(outputs, targets, strict=True) if o is not None]


@contextmanager
def _eval_mode(run: Run) -> Iterator[None]:
    units: list[Any] = [unit for stage in run.applied.stages.values() for unit in stage.units]
    random = any(is_random(node) for node in run.applied.program.module.graph.nodes)
    quiet: AbstractContextManager[Any] = NoRandomness() if random else nullcontext()
    with ExitStack() as stack:
        stack.enter_context(by_running_statistics())
        stack.enter_context(quiet)
        for unit in units:
            unit.instead = unit.written()
        try:
            yield
        finally:
            for unit in units:
                unit.instead = {}


def _forward(run: Run, inputs: dict[str, Any], size: int) -> tuple[torch.Tensor, ...] | None:
    """Through all stages in order; the last stage's outputs on its process."""
    live: tuple[torch.Tensor, ...] = ()
    for index in range(run.plan.stages):
        stage = run.applied.stages.get(index)
        if stage is None:
            continue
        if index and index - 1 not in run.applied.stages:
            edge = run.applied.edges_for(size)[index]
            live = tuple(_receive(run, border.shape(size), border.value.dtype) for border in edge)
        live = stage(*live, **inputs)
        if index == run.plan.stages - 1:
            return live
        if index + 1 not in run.applied.stages:
            for tensor in live:
                dist.send(tensor.contiguous(), group=run.world.group("pp"), group_dst=(index + 1) % run.plan.pp)
    return None


def _receive(run: Run, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=run.world.device)
    dist.recv(tensor, group=run.world.group("pp"), group_src=(run.world.index("pp") - 1) % run.plan.pp)
    return tensor
