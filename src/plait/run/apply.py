"""Everything that is done to a model under a plan, in order, on one page.

build        the user's model, large values left out                       capture/build.py
trace        forward and loss as one flat graph, cut into segments          capture/trace.py
shard        tensor parallelism: local operators and collectives            run/shard/
cut          segments to pipeline stages, stages to units                   run/captures.py, run/stages.py
rewrite      batch norm over all replicas, what autocast must leave alone   run/batchnorm.py, run/precision.py
fill         each unit gets its share of the parameters, one by one         here
recompute    units that repeat their forward in the backward                run/recompute.py
fsdp         units' parameters sharded                                      torch's fully_shard
reduce       gradients of replicas and of weights tied over stages          run/reduce.py, run/tied.py
optimize     the user's optimizer on what this process holds                run/optimizers.py
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from plait.capture.build import Built
from plait.capture.program import Program
from plait.errors import PlanError
from plait.plan.space import refuse_unsupported
from plait.run.captures import Capture, cut, prepare
from plait.run.layout import Layout
from plait.run.recompute import recompute_unit
from plait.run.reduce import Reducer
from plait.run.stages import Border, StageModule, Unit
from plait.run.tied import TiedWeights
from plait.run.world import World
from plait.schema import Graph, Plan

__all__ = ["Applied", "Held", "apply", "check", "fsdp_layout", "local_of"]


@dataclass(frozen=True)
class Held:
    """A parameter or buffer as this process holds it."""

    name: str
    tensor: torch.Tensor
    """A Parameter, a DTensor parameter under FSDP, or a buffer."""
    layout: Layout
    owns: bool
    """Whether this process, of all that hold the same share, counts it: norms, checkpoints."""

    @property
    def local(self) -> torch.Tensor:
        """The share as a plain tensor."""
        return local_of(self.tensor)


@dataclass
class Applied:
    """This process's part of the model under the plan."""

    program: Program
    plan: Plan
    world: World
    stages: dict[int, StageModule]
    parameters: dict[str, Held]
    buffers: dict[str, Held]
    reducer: Reducer | None
    tied: TiedWeights
    module: nn.Module
    """As the user built it; its large parameters may be empty."""
    captures: list[Capture] = field(default_factory=list)
    """The model's captures, the first one `program`'s; none where the model runs on its own modules."""
    capture_of: dict[int, int] = field(default_factory=dict)
    """Samples in a microbatch to the capture that serves it."""
    sharded_by_fsdp: bool = False
    split_by_tp: frozenset[str] = frozenset()
    """Parameters of which each tensor-parallel process holds a part."""
    notes: list[str] = field(default_factory=list)
    after_backward: Callable[[], None] | None = None

    @property
    def captured(self) -> bool:
        """Whether the model's graph is run, not its own modules."""
        return bool(self.captures)

    @property
    def used_names(self) -> set[str]:
        """Parameters and buffers that the graph takes, on whichever process."""
        return {p.name for p in self.program.placeholders.values() if p.kind in ("parameter", "buffer")}

    def held(self) -> list[Held]:
        """Parameters and buffers as this process holds them (constants of the graph are no state)."""
        names = self.used_names
        return [h for h in (*self.parameters.values(), *self.buffers.values()) if h.name in names]

    def program_for(self, samples: int) -> Program:
        """The capture that serves microbatches of `samples`.

        Raises:
            PlanError: the model differs too much between this size and the others.
        """
        return prepare(self, samples).program if self.captures else self.program

    def edges_for(self, samples: int) -> list[list[Border]]:
        """What crosses in front of each stage (and after the last)."""
        return prepare(self, samples).edges


def check(plan: Plan, graph: Graph) -> None:
    """Refuse what this model cannot do under a plan, before anything starts.

    Raises:
        PlanError: more stages than segments, an axis that plait cannot execute yet.
    """
    refuse_unsupported(plan)
    if plan.interleave > 1 and plan.pp == 1:
        raise PlanError(f"plan: interleave={plan.interleave} needs a pipeline", hint="set pp=2 or more")
    if plan.stages > len(graph.segments):
        raise PlanError(
            f"plan: {plan.stages} pipeline stages, but the model can be cut into {len(graph.segments)} segments only",
            hint=f"use pp x interleave of at most {len(graph.segments)}",
        )
    if plan.cuts and plan.cuts[-1] >= len(graph.segments):
        raise PlanError(f"plan: cut {plan.cuts[-1]} lies behind the last segment {len(graph.segments) - 1}")


def apply(program: Program, built: Built, plan: Plan, world: World) -> Applied:
    """The model, ready to run under the plan in this process."""
    assert program.graph is not None
    check(plan, program.graph)
    notes: list[str] = []
    capture = cut(program, plan, world)
    module, layouts, bounds = capture.module, capture.layouts, capture.bounds
    stages = {index: StageModule(graph) for index, graph in capture.stages.items()}
    filler = _Filler(built, program, layouts, plan, world)
    for stage in stages.values():
        filler.fill(stage)
    holders = _stages_of_names(program, module, bounds, plan)
    owned = list(_held(filler, holders, world))
    parameters = {h.name: h for h in owned if isinstance(h.tensor, nn.Parameter)}
    buffers = {h.name: h for h in owned if not isinstance(h.tensor, nn.Parameter) and h.name not in program.constants}
    reached = {p.name for p in program.placeholders.values() if p.kind == "parameter" and p.trainable and p.reached}
    if not program.train:
        reached = set()  # no gradients
    replicated = [h.tensor for n, h in parameters.items() if n in reached and not isinstance(h.tensor, DTensor)]
    reducer = None
    if world.samples is not None and replicated:
        reducer = Reducer(
            _as_parameters(replicated),
            world.samples,
            overlap=plan.schedule != "zerobubble",
            uses=_uses(stages, parameters),
        )
    tied = TiedWeights(
        {n: holders[n] for n in holders if len({s % plan.pp for s in holders[n]}) > 1 and n in reached}, plan, world
    )
    return Applied(
        program=program,
        plan=plan,
        world=world,
        stages=stages,
        parameters=parameters,
        buffers=buffers,
        reducer=reducer,
        tied=tied,
        module=built.module,
        captures=[capture],
        sharded_by_fsdp=plan.fsdp > 1,
        split_by_tp=frozenset(name for name, layout in layouts.items() if not layout.is_full),
        notes=notes,
    )


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's local shard, any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_parameters(tensors: list[torch.Tensor]) -> list[nn.Parameter]:
    return [t for t in tensors if isinstance(t, nn.Parameter)]


def _uses(stages: dict[int, StageModule], parameters: dict[str, Held]) -> dict[nn.Parameter, int]:
    """In how many of this process's stages each parameter is: virtual stages may share a tied one."""
    found: dict[nn.Parameter, int] = {}
    for stage in stages.values():
        units: list[Any] = list(stage.units)
        names = {name for unit in units for _, kind, name in unit.slots if kind == "parameter"}
        for name in names:
            tensor = parameters[name].tensor
            assert isinstance(tensor, nn.Parameter)
            found[tensor] = found.get(tensor, 0) + 1
    return found


class _Filler:
    """Gives units their parameters and buffers: at most one unit's worth is whole at a time."""

    def __init__(self, built: Built, program: Program, layouts: dict[str, Layout], plan: Plan, world: World) -> None:
        self._built = built
        self._constants = program.constants
        self._trains = program.train
        self._layouts = layouts
        self._plan = plan
        self._world = world
        self.tensors: dict[str, torch.Tensor] = {}
        self.layouts: dict[str, Layout] = {}

    def fill(self, stage: StageModule) -> None:
        """Fill a stage, apply recomputation and FSDP to its units."""
        units: list[Unit] = [stage.prelude, *stage.units]
        if self._plan.fsdp == 1:
            for unit in units:
                self._fill_unit(unit)
        else:
            self._fill_unit(stage.prelude)
            for group in _sharing(units[1:]):
                fresh: dict[str, nn.Parameter] = {}
                for unit in group:
                    self._fill_unit(unit, fresh)
                self._shard(group)
        for unit in units[1:] if self._trains else ():
            recompute_unit(unit, self._plan.recompute_of(unit.first_segment))
        if self._plan.fsdp > 1:
            self._shard([stage])
            assert isinstance(stage, FSDPModule)
            stage.set_is_last_backward(True)
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    # The loss of each part carries its weight, so shards are summed, not averaged.
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)

    def _fill_unit(self, unit: Unit, fresh: dict[str, nn.Parameter] | None = None) -> None:
        for attribute, kind, name in unit.slots:
            if fresh is not None and name in fresh:
                tensor: torch.Tensor = fresh[name]
            elif fresh is None and name in self.tensors:
                tensor = self.tensors[name]
            else:
                tensor = self._value(name, kind)
            if isinstance(tensor, nn.Parameter):
                unit.register_parameter(attribute, tensor)
                if fresh is not None:
                    if isinstance(self.tensors.get(name), DTensor):
                        raise PlanError(
                            f"plan: {name} is shared by two virtual stages of one process, which fsdp cannot shard",
                            hint="use interleave=1 or fsdp=1",
                        )
                    fresh[name] = tensor
            else:
                unit.register_buffer(attribute, tensor)
            self.tensors[name] = tensor

    def _value(self, name: str, kind: str) -> torch.Tensor:
        whole = self._constants[name] if kind == "constant" else self._built.value(name)
        layout = self._layouts.get(name) or Layout.full(tuple(whole.shape))
        self.layouts[name] = layout
        # FSDP takes contiguous parameters only; where values lie in memory changes no result.
        tensor = layout.take(whole).to(self._world.device).contiguous()
        if kind == "parameter":
            return nn.Parameter(tensor, requires_grad=self._trains and self._built.trains(name))
        return tensor

    def _shard(self, modules: list[Any]) -> None:
        assert self._world.mesh is not None
        # FSDP warns of writes into what a unit gives back; units copy what they write into (run/stages.py).
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = self._world.mesh["dp", "fsdp"] if self._plan.dp > 1 else self._world.mesh["fsdp"]
        # FSDP shards rows; a parameter without any (a scalar, or empty) stays whole and is reduced like a replica's.
        scalars = {p for m in modules for p in m.parameters() if p.dim() == 0 or p.numel() == 0}
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=mesh,
            # A zero-bubble schedule gathers and reduces by stage (torch does); parameters stay whole in between.
            reshard_after_forward=self._plan.zero == 3 and self._plan.schedule != "zerobubble",
            ignored_params=scalars or None,
        )
        for unit in modules:
            for attribute, kind, name in getattr(unit, "slots", ()):
                if kind == "parameter":
                    self.tensors[name] = getattr(unit, attribute)
                    self.layouts[name] = fsdp_layout(self.layouts[name], self.tensors[name])


def _sharing(units: list[Unit]) -> list[list[Unit]]:
    """Units in groups: those that share a parameter must be sharded together."""
    groups: list[list[Unit]] = []
    names: list[set[str]] = []
    for unit in units:
        own = {name for _, kind, name in unit.slots if kind == "parameter"}
        hit = [i for i, have in enumerate(names) if have & own]
        if not hit:
            groups.append([unit])
            names.append(own)
            continue
        first = hit[0]
        groups[first].append(unit)
        names[first] |= own
        for i in reversed(hit[1:]):
            groups[first] += groups.pop(i)
            names[first] |= names.pop(i)
    return groups


def fsdp_layout(layout: Layout, tensor: torch.Tensor) -> Layout:
    """The layout that is left of `layout` when FSDP has sharded the tensor's rows."""
    if not isinstance(tensor, DTensor) or layout.local_shape != tuple(tensor.shape):
        return layout
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return layout.rows(offset[0], offset[0] + shape[0])


def _stages_of_names(
    program: Program, module: torch.fx.GraphModule, bounds: list[tuple[int, int]], plan: Plan
) -> dict[str, list[int]]:
    """For each parameter and buffer, the stages that use it."""
    found: dict[str, set[int]] = {}
    for node in module.graph.nodes:
        if node.op != "placeholder" or program.placeholders[node.name].kind == "input":
            continue
        for user in node.users:
            segment = user.meta.get("segment", -1)
            places = [i for i, (low, high) in enumerate(bounds) if low <= segment < high]
            found.setdefault(program.placeholders[node.name].name, set()).update(places or range(plan.stages))
    return {name: sorted(places) for name, places in found.items()}


def _held(filler: _Filler, holders: dict[str, list[int]], world: World) -> Iterator[Held]:
    for name, tensor in filler.tensors.items():
        layout = filler.layouts[name]
        first = world.index("pp") == holders.get(name, [0])[0] % max(1, _pp(world))
        alone_in_tp = not _same_over_tp(filler, name) or world.index("tp") == 0
        # Of replicas the first counts; of FSDP shards every one has another part.
        replica = world.index("dp") == 0 and (isinstance(tensor, DTensor) or world.index("fsdp") == 0)
        yield Held(name, tensor, layout, first and alone_in_tp and replica)


def _pp(world: World) -> int:
    return 1 if world.mesh is None else int(world.mesh["pp"].size())


def _same_over_tp(filler: _Filler, name: str) -> bool:
    base = filler._layouts.get(name)
    return base is None or base.is_full
