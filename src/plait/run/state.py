"""What of a run goes into a checkpoint, under the user's own names, and comes back out of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait.capture.job import Job
from plait.capture.trace import tied_names
from plait.errors import CheckpointError
from plait.run.apply import Held, local_of
from plait.run.checkpoint import Restored, Shard, iterate_whole
from plait.run.start import Run

__all__ = ["load_whole", "restore", "run_shards", "run_state", "whole_names"]


def run_shards(run: Run) -> dict[str, Shard]:
    """This process's tensors: parameters, buffers, and optimizer state as `optimizer.<state>.<parameter>`.

    State of one number (a step count) is small and the same everywhere; it travels in `run_state`.
    """
    shards = {h.name: Shard(h.local.detach(), h.layout, h.owns) for h in run.held()}
    for held, state in _optimizer_states(run):
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and local_of(value).shape == held.local.shape and value.dim():
                shards[f"optimizer.{key}.{held.name}"] = Shard(local_of(value), held.layout, held.owns)
    return shards


def _optimizer_states(run: Run) -> list[tuple[Held, dict[str, Any]]]:
    if run.optimizer is None:
        return []
    _fill_states(run)
    return [
        (held, run.optimizer.state[held.tensor])
        for held in run.applied.parameters.values()
        if held.tensor in run.optimizer.state
    ]


def _fill_states(run: Run) -> None:
    """Before a first step an optimizer has no state to load into: a step with zero gradients at rate zero makes it."""
    assert run.optimizer is not None
    if run.optimizer.state or run.steps_done:
        return
    groups = run.optimizer.param_groups
    kept = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    values = {h.name: h.local.detach().clone() for h in run.applied.parameters.values()}
    for name, held in run.applied.parameters.items():
        if name in run.reached:
            held.tensor.grad = torch.zeros_like(held.tensor)
    for group in groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group.get("lr"), torch.Tensor) else 0.0
    run.optimizer.step()
    for group, before in zip(groups, kept, strict=True):
        group.update(before)
    with torch.no_grad():
        for name, held in run.applied.parameters.items():
            held.local.copy_(values[name])
            held.tensor.grad = None


def run_state(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what every process shares, what is this process's own) beside tensors."""
    own: dict[str, Any] = {"rng": torch.get_rng_state(), "scalars": {}}
    if run.world.device.type != "cpu":
        own["device_rng"] = torch.get_device_module(run.world.device).get_rng_state(run.world.device)
    for held, state in _optimizer_states(run):
        own["scalars"][held.name] = {
            key: value
            for key, value in state.items()
            if not isinstance(value, torch.Tensor) or not value.dim() or local_of(value).shape != held.local.shape
        }
    if run.optimizer is not None:
        own["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in run.optimizer.param_groups]
        for group in own["groups"]:
            group.pop("param_names", None)
    shared = {
        "steps": run.steps_done,
        "scheduler": run.scheduler.state_dict() if run.scheduler is not None else None,
        "plan": run.plan.to_dict(),
    }
    shared["scheduler"] = _plain_only(shared["scheduler"])
    return shared, own


def _plain_only(state: Any) -> Any:
    """A scheduler's state without the functions that torch's LambdaLR keeps in it."""
    if isinstance(state, dict):
        return {k: _plain_only(v) for k, v in state.items() if not callable(v)}
    if isinstance(state, list | tuple):
        return type(state)(None if callable(v) else _plain_only(v) for v in state)
    return state


def restore(run: Run, restored: Restored) -> None:
    """Put back what `run_state` took; tensors are in place already.

    Raises:
        CheckpointError: it was saved by another number of processes (loading under another plan comes later).
    """
    own = restored.rank_state
    saved = restored.state.get("plan")
    if own is None or saved != run.plan.to_dict():
        raise CheckpointError(
            f"checkpoint of step {restored.step}: it was saved under another plan",
            hint="resume with the plan and the number of devices of the first run",
        )
    run.steps_done = int(restored.state["steps"])
    if run.scheduler is not None and restored.state.get("scheduler") is not None:
        run.scheduler.load_state_dict({**run.scheduler.state_dict(), **restored.state["scheduler"]})
    torch.set_rng_state(own["rng"])
    if "device_rng" in own:
        torch.get_device_module(run.world.device).set_rng_state(own["device_rng"], run.world.device)
    if run.optimizer is None:
        return
    for held, state in _optimizer_states(run):
        for key, value in own["scalars"].get(held.name, {}).items():
            state[key] = value
    for group, values in zip(run.optimizer.param_groups, own.get("groups", ()), strict=True):
        group.update(values)


def whole_names(run: Run) -> list[str]:
    """Parameters and persistent buffers of the whole model that some process holds, in the user's order."""
    return [name for name in run.state_names if name in run.used_names]


def load_whole(job: Job, directory: Path) -> nn.Module:
    """The job's model, whole, with a checkpoint's weights; in eval mode is the caller's choice.

    Raises:
        CheckpointError: the checkpoint is broken, or of another model.
    """
    if isinstance(job.model, nn.Module):
        module = copy.deepcopy(job.model)
    else:
        module = job.model()
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    aliases = tied_names(module)
    with torch.no_grad():
        for name, value in iterate_whole(directory):
            tensor = own.get(name, own.get(aliases.get(name, "")))
            if tensor is None or tensor.shape != value.shape:
                raise CheckpointError(f"checkpoint {directory}: {name} does not fit the model")
            tensor.copy_(value)
    return module
