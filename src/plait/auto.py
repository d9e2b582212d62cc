"""All of plait in one call. The page to read first."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from plait.capture.job import Job

if TYPE_CHECKING:
    import torch
    from torch import nn

    from plait.run.start import Run
    from plait.schema import Cluster, Plan

__all__ = ["parallelize"]


def parallelize(
    model: nn.Module | Callable[[], nn.Module],
    optimizer: Callable[[Any], torch.optim.Optimizer] | None,
    batch: tuple[Any, Any],
    *,
    plan: Plan | str | None = None,
    cluster: Cluster | None = None,
    seed: int = 0,
    **options: Any,
) -> Run:
    """The model under a plan, ready to `step`, in every process of the plan.

    Captures the model, finds the cluster (the processes of this computer unless one is given), searches the fastest
    plan that fits and that plait can run (unless one is given), and applies it. `options` are the Job's: loss, ...

    Raises:
        PlanError: the plan does not fit the processes, the batch or the model.
        HardwareError: this computer was not measured yet (`plait hardware probe`) and no cluster is given.
    """
    from plait.capture import batch as batches
    from plait.capture.trace import trace
    from plait.plan.search import search
    from plait.plan.space import Space
    from plait.run.start import start
    from plait.schema import Cluster

    job = Job(model, optimizer=optimizer, batch=batch, **options)
    if plan is None:
        graph = trace(job).graph
        assert graph is not None
        where = cluster or Cluster.local(devices=int(os.environ.get("WORLD_SIZE", "1")))
        plan = search(graph, where, batch=batches.batch_size(job), space=Space(executable=True)).best
    return start(job, plan, seed=seed)
