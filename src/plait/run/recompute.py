"""Activation recomputation by unit: keep nothing (full), or only what matrix multiplies gave (selective)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from plait.capture.prelude import written_by
from plait.capture.work import kind_of
from plait.run.stages import Unit, UnitGraph

__all__ = ["recompute_unit"]

_KEPT = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_grouped_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""Operators whose results selective recomputation keeps: those that cost the most to repeat per byte kept."""


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    packet = getattr(operator, "overloadpacket", None)
    name = getattr(packet, "__name__", "")
    return CheckpointPolicy.MUST_SAVE if name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_unit(unit: Unit, choice: str) -> None:
    """Make a unit recompute its activations in the backward (`none` changes nothing).

    Random numbers are repeated; the second run reads the buffers that the first one read, and writes none.
    """
    if choice == "none":
        return
    if choice == "selective" and any(_writes_into_kept(graph) for graph in unit.graphs):
        choice = "full"

    @contextmanager
    def again(before: dict[str, torch.Tensor]) -> Iterator[None]:
        unit.instead = before
        try:
            yield
        finally:
            unit.instead = {}

    def contexts(before: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        if choice == "full":
            return ExitStack(), again(before)
        first, second = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
        return first, _Both(again(before), second)

    def around(call: Any, *values: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*values)
        before = unit.written()  # a forward may read what an earlier one wrote (spectral norm's vectors)
        return checkpoint(call, *values, use_reentrant=False, context_fn=lambda: contexts(before))

    unit.around = around


def _writes_into_kept(graph: UnitGraph) -> bool:
    """Whether an operator writes into what a multiply gave (a ReLU in place): kept, it would be written twice."""
    nodes = list(graph.module.graph.nodes)
    kept = {
        storage
        for node in nodes
        if node.op == "call_function" and kind_of(node) in ("matmul", "conv", "attention")
        for storage in node.meta.get("storages", ())
    }
    return any(kept & argument.meta.get("storages", frozenset()) for node in nodes for argument in written_by(node))


class _Both:
    """Two context managers entered as one."""

    def __init__(self, *contexts: Any) -> None:
        self._contexts = contexts
        self._stack = ExitStack()

    def __enter__(self) -> None:
        for context in self._contexts:
            self._stack.enter_context(context)

    def __exit__(self, *problem: object) -> None:
        self._stack.close()
