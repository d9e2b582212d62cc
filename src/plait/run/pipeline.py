"""Microbatches through pipeline stages: torch's stages and schedules, with shapes that plait knows beforehand.

torch's PipelineStage finds its receive shapes by running the model once; plait has them from the captured graph, for
each microbatch by itself, so that microbatches may differ in size (the last batch of an epoch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)
from torch.distributed.pipelining.stage import _RecvInfo

from plait.run.stages import Border, StageModule
from plait.schema import Plan

__all__ = ["Loss", "run_forward_pipeline", "run_pipeline", "schedule_for"]

Loss = Callable[[Any, Any], torch.Tensor]
"""loss(stage outputs, (targets, weight)) -> this microbatch's weighted part of the step's loss."""


class _Hidden(nn.Module):
    """The stage without its FSDP type: FSDP's own hooks gather and reduce, not the schedule."""

    def __init__(self, stage: StageModule) -> None:
        super().__init__()
        self._stage = (stage,)  # in a tuple, so that it is no submodule

    def forward(self, *live: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """As the stage."""
        result: tuple[torch.Tensor, ...] = self._stage[0](*live, **inputs)
        return result

    def parameters(self, recurse: bool = True) -> Any:
        """The stage's: zero-bubble schedules split the backward by them."""
        return self._stage[0].parameters(recurse)


class _Stage(PipelineStage):
    """A PipelineStage whose borders may have another shape in every microbatch."""

    def __init__(
        self,
        stage: StageModule,
        index: int,
        plan: Plan,
        device: torch.device,
        group: dist.ProcessGroup,
        sizes: list[int],
        edges: list[list[list[Border]]],
    ) -> None:
        self._takes = [[_meta_tensor(b, size) for b in of[index]] for of, size in zip(edges, sizes, strict=True)]
        self._gives = [[_meta_tensor(b, size) for b in of[index + 1]] for of, size in zip(edges, sizes, strict=True)]
        is_last = index == plan.stages - 1
        # The last stage's outputs go to the loss or the caller only; stand-ins satisfy torch's bookkeeping.
        stand_ins = tuple(torch.empty(0, device="meta") for _ in stage.graphs[0].gives)
        outputs = stand_ins if is_last else tuple(self._gives[0])
        fsdp_by_schedule = plan.fsdp > 1 and plan.schedule == "zerobubble"
        super().__init__(
            stage if fsdp_by_schedule else _Hidden(stage),
            index,
            plan.stages,
            device,
            input_args=tuple(self._takes[0]),
            output_args=outputs,
            group=group,
        )
        self._zero = plan.zero
        self._module = stage

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        if self.is_first:
            super()._setup_forward_recv_info(num_microbatches, has_backward)
            return
        for chunk in range(num_microbatches):
            self.args_recv_info[chunk] = tuple(
                self._receive(meta, self.stage_index - 1, meta.requires_grad) for meta in self._takes[chunk]
            )

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        self.chunks = num_microbatches
        for chunk in range(num_microbatches):
            gives = [] if self.is_last else self._gives[chunk]
            self.grad_recv_info[chunk] = tuple(
                self._receive(meta, self.stage_index + 1, False)
                if meta.requires_grad
                else _RecvInfo(input_name="none", source=self.stage_index + 1, buffer=None, tensor_meta=None)
                for meta in gives
            )

    def _receive(self, meta: torch.Tensor, source: int, requires_grad: bool) -> _RecvInfo:
        from torch.distributed.pipelining._utils import extract_tensor_metas

        metas = extract_tensor_metas((meta.detach().requires_grad_(requires_grad),))
        assert metas is not None
        return _RecvInfo(
            input_name=f"stage {self.stage_index} from {source}",
            source=source,
            buffer=torch.empty(meta.shape, dtype=meta.dtype, device=self.device),
            tensor_meta=metas[0],
        )

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """As torch's; gradients that are sent are made contiguous (gloo sends nothing else)."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if bwd_chunk_id in self.bwd_cache:
            grads = self.bwd_cache[bwd_chunk_id]
            self.bwd_cache[bwd_chunk_id] = tuple(g if g is None else g.contiguous() for g in grads)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """ZeRO 1 keeps whole gradients until the last microbatch; 2 and 3 scatter each microbatch's."""
        if isinstance(self._module, FSDPModule) and not isinstance(self.submod, FSDPModule):
            self._module.set_is_last_backward(last_backward)
            if self._zero == 1:
                self._module.set_requires_gradient_sync(last_backward)
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)


def _meta_tensor(border: Border, size: int) -> torch.Tensor:
    tensor = torch.empty(border.shape(size), dtype=border.value.dtype, device="meta")
    return tensor.requires_grad_(border.requires_grad)


def schedule_for(
    plan: Plan,
    stages: dict[int, StageModule],
    edges: list[list[list[Border]]],
    sizes: list[int],
    device: torch.device,
    group: dist.ProcessGroup,
    loss: Loss | None,
) -> Any:
    """torch's schedule object for this process's `stages` (index -> module) and these microbatch sizes.

    `edges[m][i]` is what crosses in front of stage i in microbatch m. With fewer microbatches than 1F1B needs, all
    forwards run first. Without a `loss` there are forwards only.
    """
    parts: list[Any] = [
        _Stage(stage, index, plan, device, group, sizes, edges) for index, stage in sorted(stages.items())
    ]
    options: dict[str, Any] = {"n_microbatches": len(sizes), "loss_fn": loss, "scale_grads": False}
    if loss is None:  # nothing is kept for a backward, so that no order of forwards saves memory
        return ScheduleGPipe(parts[0], **options) if len(parts) == 1 else ScheduleLoopedBFS(parts, **options)
    few = len(sizes) < plan.stages
    if plan.schedule in ("gpipe", "1f1b") and len(parts) == 1:
        kind = ScheduleGPipe if few or plan.schedule == "gpipe" else Schedule1F1B
        return kind(parts[0], **options)
    rounds = max(1, len(sizes) // plan.pp)
    even = len(sizes) % rounds == 0  # interleaved schedules want whole rounds; a last, smaller batch may not give them
    if plan.schedule == "zerobubble" and even:
        return ScheduleInterleavedZeroBubble(parts, **options)
    if plan.schedule == "gpipe" or not even:
        return ScheduleLoopedBFS(parts, **options)
    return ScheduleInterleaved1F1B(parts, **options)


def run_pipeline(schedule: Any, inputs: list[dict[str, Any]], targets: list[Any]) -> list[torch.Tensor]:
    """One step: forward and backward of every microbatch. Losses on the last stage's process, else an empty list.

    `inputs[i]` are microbatch i's model inputs by placeholder name; every stage takes what it needs of them.
    """
    _begin(schedule)
    losses: list[torch.Tensor] = []
    schedule._step_microbatches([()] * len(inputs), inputs, targets, losses, return_outputs=False)
    return losses


def run_forward_pipeline(schedule: Any, inputs: list[dict[str, Any]]) -> list[tuple[torch.Tensor, ...]] | None:
    """Forward of every microbatch, by a schedule without a loss. Each one's outputs on the last stage's process, else None.

    A stage works on a microbatch while the next stage works on the one before. `inputs` as in `run_pipeline`.
    """
    stages = _begin(schedule)
    schedule._step_microbatches([()] * len(inputs), inputs, None, None, return_outputs=True)
    last = next((stage for stage in stages if stage.is_last), None)
    outputs = None if last is None else list(last.output_chunks)
    for stage in stages:  # nothing of a batch stays in memory
        stage.clear_runtime_states()
    return outputs


def _begin(schedule: Any) -> list[Any]:
    stages = getattr(schedule, "_stages", None) or [schedule._stage]
    for stage in stages:
        stage.has_backward = schedule._has_backward
        stage.clear_runtime_states()
    return list(stages)
