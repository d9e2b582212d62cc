"""A run measured in the fields of `Estimate`: where a step's time goes, and the bytes its tensors hold.

Time is taken around what blocks: every wait for a collective or a send. Waits of the pipeline's sends and receives are
`bubble` (they include the transfer itself), other waits `communication_exposed`; communication that runs behind
compute takes no time of the step's own and is not measured. The rest of the step, without the optimizer, is `compute`
(recomputation included).
"""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules
from torch.utils._python_dispatch import TorchDispatchMode

from plait.run.world import World

__all__ = ["Meter", "tensor_bytes"]

WARM_UP = 3
"""First steps, which fill caches and buffers and are left out."""


@dataclass
class Meter:
    """Collects steps; `summary` gives medians over the steps after the first few."""

    steps: list[dict[str, float]] = field(default_factory=list)
    peak_memory: float | None = None
    """Bytes, in this process."""

    @contextmanager
    def watching(self, parts: dict[str, float]) -> Iterator[None]:
        """Adds the time spent waiting within to `parts["bubble"]` and `parts["communication_exposed"]`."""
        kind = "communication_exposed"
        whole_wait, whole_batch = dist.Work.wait, schedules._wait_batch_p2p

        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return whole_wait(work, *args, **kwargs)
            finally:
                parts[kind] += time.perf_counter() - begin

        def wait_batch(works: Any) -> None:
            nonlocal kind
            kind = "bubble"
            try:
                whole_batch(works)
            finally:
                kind = "communication_exposed"

        with mock.patch.object(dist.Work, "wait", wait), mock.patch.object(schedules, "_wait_batch_p2p", wait_batch):
            yield

    def step(self, forward_backward: Callable[[], float], update: Callable[[], None]) -> float:
        """Run and measure one step; the loss."""
        parts = {"communication_exposed": 0.0, "bubble": 0.0}
        begin = time.perf_counter()
        with self.watching(parts):
            loss = forward_backward()
        middle = time.perf_counter()
        update()
        end = time.perf_counter()
        parts["optimizer"] = end - middle
        parts["compute"] = middle - begin - parts["bubble"] - parts["communication_exposed"]
        parts["step_time_s"] = end - begin
        self.steps.append(parts)
        return loss

    def summary(self, world: World, tokens: float) -> dict[str, Any]:
        """Medians of the process that computes longest, and every process's peak memory; the same everywhere.

        `tokens` per step, all processes together.
        """
        usual = self.steps[WARM_UP:] or self.steps
        own = {name: statistics.median(step[name] for step in usual) for name in usual[0]} if usual else {}
        everyone: list[Any] = [(own, self.peak_memory)]
        if world.size > 1:
            everyone = [None] * world.size
            dist.all_gather_object(everyone, (own, self.peak_memory))
        longest = max((row for row, _ in everyone), key=lambda row: row.get("compute", 0.0))
        if not longest:
            return {}
        found: dict[str, Any] = dict(longest)
        found["tokens_per_s"] = tokens / longest["step_time_s"]
        peaks = [peak for _, peak in everyone if peak is not None]
        if peaks:
            found["peak_memory"] = max(peaks)
            found["peak_memory_by_rank"] = peaks
        return found


@contextmanager
def tensor_bytes(found: Callable[[int], None]) -> Iterator[None]:
    """Calls `found` with the most bytes that tensors of this process held at once within.

    What was alive before is counted by walking the heap; file mappings without pages (deferred models) are not.
    """
    gc.collect()
    alive = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _plain_tensors()}
    mode = _Counting(set(alive))
    with mode:
        yield
    found(sum(alive.values()) + mode.peak)


def _plain_tensors() -> list[torch.Tensor]:
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return [
        t for t in tensors if t.layout is torch.strided and t.device.type != "meta" and not t.untyped_storage().filename
    ]


class _Counting(TorchDispatchMode):
    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
