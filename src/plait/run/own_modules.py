"""A model that cannot be captured, run on its own modules: replicas and FSDP only.

It stands in for a single pipeline stage, so that steps, checkpoints and verification are the same as for a captured
model. Control flow may leave parameters without a gradient in some steps, so nothing is reduced before the backward
has ended, and a parameter counts as used if any process used it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from plait.capture.build import Built
from plait.capture.job import Job
from plait.capture.program import Placeholder, Program
from plait.capture.trace import call_model, eval_mode, loss_of, path_name, tied_names
from plait.errors import CaptureError, PlanError
from plait.run.apply import Applied, Held, fsdp_layout
from plait.run.batchnorm import BatchNorm
from plait.run.layout import Layout
from plait.run.reduce import Reducer
from plait.run.tied import TiedWeights
from plait.run.world import World
from plait.schema import Graph, ParameterSpec, Plan

__all__ = ["apply_own_modules", "refuse_uncaptured"]


def refuse_uncaptured(plan: Plan, reason: CaptureError) -> None:
    """A plan that cuts the model needs it captured.

    Raises:
        PlanError: the plan has tp, pp or recomputation.
    """
    if plan.tp * plan.pp > 1 or plan.recompute != "none" or plan.recompute_segments:
        raise PlanError(
            f"plan: {plan.spec()} needs the model captured, and that failed\n  {reason.message}", hint=reason.hint
        )


def apply_own_modules(
    job: Job, built: Built, plan: Plan, world: World, samples: int, reason: CaptureError, *, train: bool = True
) -> Applied:
    """The model as it is, replicated or sharded by FSDP; without `train` in eval mode and for its outputs."""
    module = built.module
    aliases = tied_names(module)
    _fill(built, world)
    stage = _OwnModules(job, module, world) if train else _OwnOutputs(job, module)
    program = _program(job, module, aliases, samples)
    if plan.fsdp > 1:
        _shard(stage, module, plan, world)
    parameters: dict[str, Held] = {}
    buffers: dict[str, Held] = {}
    for name, tensor in module.named_parameters():
        shape = tuple(tensor.shape)
        layout = fsdp_layout(Layout.full(shape), tensor)
        owns = world.index("dp") == 0 and (isinstance(tensor, DTensor) or world.index("fsdp") == 0)
        parameters[name] = Held(name, tensor, layout, owns)
    for name, buffer in module.named_buffers():
        buffers[name] = Held(name, buffer, Layout.full(tuple(buffer.shape)), world.rank == 0)
    replicated = [h.tensor for h in parameters.values() if not isinstance(h.tensor, DTensor)]
    trained = [p for p in replicated if isinstance(p, nn.Parameter) and p.requires_grad and train]
    reducer = None
    if world.samples is not None and trained:
        reducer = Reducer(trained, world.samples, overlap=False, all_used=False)
    return Applied(
        program=program,
        plan=plan,
        world=world,
        stages={0: stage},  # type: ignore[dict-item]
        parameters=parameters,
        buffers=buffers,
        reducer=reducer,
        tied=TiedWeights({}, plan, world),
        module=module,
        sharded_by_fsdp=plan.fsdp > 1,
        notes=[f"the model runs on its own modules: {reason.message}"],
        after_backward=(lambda: stage.drop_unused(module))
        if isinstance(stage, _OwnModules) and plan.fsdp > 1
        else None,
    )


def _fill(built: Built, world: World) -> None:
    """Every parameter and buffer gets its value; tied ones stay one object."""
    made: dict[int, Any] = {}
    for owner_name, owner in built.module.named_modules():
        for slots in (owner._parameters, owner._buffers):
            for attribute, tensor in slots.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    name = f"{owner_name}.{attribute}".lstrip(".")
                    value = built.value(name).clone().to(world.device)
                    if isinstance(tensor, nn.Parameter):
                        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = value
                slots[attribute] = made[id(tensor)]


def _program(job: Job, module: nn.Module, aliases: dict[str, str], samples: int) -> Program:
    """The record of a model about which only its parameters and inputs are known."""
    graph = fx.Graph()
    places: dict[str, Placeholder] = {}
    for i, (path, _) in enumerate(pytree.tree_flatten_with_path(job.batch)[0]):
        node = graph.placeholder(f"input_{i}")
        places[node.name] = Placeholder("input", path_name(path))
    graph.output(())
    named = dict(module.named_parameters())
    others: dict[str, list[str]] = {}
    for alias, first in aliases.items():
        others.setdefault(first, []).append(alias)
    for name, tensor in named.items():
        places[f"parameter {name}"] = Placeholder("parameter", name, tensor.requires_grad)
    for name, _ in module.named_buffers():
        places[f"buffer {name}"] = Placeholder("buffer", name)

    def spec(name: str, tensor: torch.Tensor, trainable: bool) -> ParameterSpec:
        dtype = str(tensor.dtype).removeprefix("torch.")
        alias = tuple(others.get(name, ()))
        return ParameterSpec(name=name, shape=tuple(tensor.shape), dtype=dtype, trainable=trainable, aliases=alias)

    record = Graph(
        name=job.name or type(module).__name__,
        batch=samples,
        tokens_per_sample=1,
        inputs=(),
        parameters=tuple(spec(n, p, p.requires_grad) for n, p in named.items()),
        buffers=tuple(spec(n, b, False) for n, b in module.named_buffers()),
        segments=(),
    )
    return Program(
        job, fx.GraphModule(nn.Module(), graph), places, True, (1, sys.maxsize), samples, aliases, graph=record
    )


def _shard(stage: nn.Module, module: nn.Module, plan: Plan, world: World) -> None:
    """fully_shard on repeated blocks that share nothing with the rest, then on the rest."""
    assert world.mesh is not None
    mesh = world.mesh["dp", "fsdp"] if plan.dp > 1 else world.mesh["fsdp"]
    scalars = {p for p in module.parameters() if p.dim() == 0 or p.numel() == 0} or None
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": plan.zero == 3, "ignored_params": scalars}
    for block in _blocks(module):
        fully_shard(block, **options)
    fully_shard(stage, **options)
    for part in stage.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            # A process that took another branch still takes part in the reduction, with zeros.
            part.set_reduce_scatter_unused_params(True)


def _blocks(module: nn.Module) -> list[nn.Module]:
    uses: dict[int, int] = {}
    for owner in module.modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    inner = {id(m) for outer in lists for m in outer.modules() if m is not outer}
    found = []
    for container in lists:
        if id(container) in inner:
            continue
        for block in container:
            own = list(block.parameters())
            if own and all(uses[id(p)] == 1 for p in own) and not isinstance(block, nn.ModuleList):
                found.append(block)
    return found


class _OwnModules(nn.Module):
    """The user's model and loss in the shape of a pipeline stage."""

    def __init__(self, job: Job, module: nn.Module, world: World) -> None:
        super().__init__()
        self.module = module
        self.units: list[Any] = []
        self._job = job
        self._spec = pytree.tree_structure(job.batch)
        self._batch_norm = _BatchNormMode(BatchNorm(world.samples))
        self._world = world
        self._ran: set[str] = set()
        for name, part in module.named_modules():
            if part._parameters:
                part.register_forward_pre_hook(lambda *_, name=name: self._ran.add(name))

    def forward(self, samples: int = 0, **leaves: Any) -> tuple[torch.Tensor]:
        """The loss of one part of a batch."""
        del samples
        inputs, targets = pytree.tree_unflatten(list(leaves.values()), self._spec)
        with self._batch_norm:
            # A loss of its own storage: FSDP hooks into what comes out, which must be no view.
            return (loss_of(call_model(self.module, inputs), targets, self._job.loss).clone(),)

    def drop_unused(self, module: nn.Module) -> None:
        """FSDP gives zeros to parameters that no process used in this step; one device gives them no gradient."""
        named = [(n, p) for n, p in module.named_parameters() if isinstance(p, DTensor) and p.grad is not None]
        used = torch.tensor([n.rpartition(".")[0] in self._ran or bool(p.grad.to_local().any()) for n, p in named])  # type: ignore[union-attr]
        self._ran.clear()
        flags = used.to(self._world.device, torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._world.samples)
        for (_, parameter), flag in zip(named, flags.tolist(), strict=True):
            if not flag:
                parameter.grad = None


class _OwnOutputs(nn.Module):
    """The user's model, in eval mode, in the shape of a pipeline stage."""

    def __init__(self, job: Job, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.units: list[Any] = []
        self._spec = pytree.tree_structure(job.batch)
        self._outputs: Any = None

    def forward(self, samples: int = 0, **leaves: Any) -> tuple[torch.Tensor, ...]:
        """The tensors of the model's outputs for one part of a batch."""
        del samples
        inputs, _ = pytree.tree_unflatten(list(leaves.values()), self._spec)
        with eval_mode(self.module):
            self._outputs = call_model(self.module, inputs)
        return tuple(leaf for leaf in pytree.tree_leaves(self._outputs) if isinstance(leaf, torch.Tensor))

    def structure(self, tensors: list[torch.Tensor]) -> Any:
        """The outputs of the last forward with these tensors in the place of its own."""
        rest = iter(tensors)
        return pytree.tree_map(lambda leaf: next(rest) if isinstance(leaf, torch.Tensor) else leaf, self._outputs)


class _BatchNormMode(TorchFunctionMode):
    """Training-mode batch norm over all replicas, whoever calls it."""

    def __init__(self, function: BatchNorm) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.batch_norm:
            return func(*args, **kwargs)
        bound = _BATCH_NORM.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if not given["training"]:
            return func(*args, **kwargs)
        names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        x, weight, bias, mean, var, training, momentum, eps = (given[name] for name in names)
        return self._function(x, weight, bias, mean, var, training, momentum, eps, False)


_BATCH_NORM = inspect.signature(nn.functional.batch_norm)
