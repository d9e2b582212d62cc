"""The schedule of each kernel that a library is compiled with: the quickest measured one that computes what plain loops do.

TVM's transformations are not always right: a layout of weights may be worked out from accesses that do not show all of it. So
every schedule is held against the kernel's plain loops on random values before it is used, the next one follows where it differs,
and where none is left a kernel stays plain loops: slow, and right. Plain loops of large kernels would take seconds each; those are
held against another schedule, and the whole model's outputs against eager's, as always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from plait.serve.runtimes.tvm_tuner import space_of_schedules, values_for

__all__ = ["Chosen", "chosen"]

_MEASURED = 4  # of the record, the quickest first
_DRAWN = 4
_LARGE = 3e8  # FLOP; plain loops do 10^9 a second or less
_EQUAL = 1e-4  # largest difference over the largest value: sums of 10^4 float32 numbers in another order stay below


class Chosen:
    """A database with one schedule a kernel, and how many have none."""

    def __init__(self) -> None:
        from tvm.s_tir.meta_schedule.database import MemoryDatabase

        self.database = MemoryDatabase()
        self.refused = 0
        """Schedules that computed something else, or could not be built."""
        self.plain = 0
        """Kernels left as plain loops."""


def chosen(tasks: Sequence[Any], target: Any, record: Path) -> Chosen:
    """A schedule that is right for every task, from the record of a tuning or drawn from MetaSchedule's space."""
    from tvm.s_tir import analysis
    from tvm.s_tir.meta_schedule.database import JSONDatabase, TuningRecord

    record.mkdir(exist_ok=True)
    measured = JSONDatabase(work_dir=str(record))
    found = Chosen()
    for number, task in enumerate(tasks):
        kernel = task.dispatched[0]
        candidates = list(_candidates(kernel, target, measured, number + 1))
        is_large = analysis.estimate_tir_flops(kernel) > _LARGE and candidates
        expected = _outputs(_scheduled(kernel, candidates[-1][0]) if is_large else kernel, target)
        for trace, arguments in candidates:
            if _is_right(kernel, trace, expected, target):
                workload = found.database.commit_workload(kernel)
                found.database.commit_tuning_record(TuningRecord(trace, workload, [1.0], target, arguments))
                break
            found.refused += 1
        else:
            found.plain += 1
    return found


def _candidates(kernel: Any, target: Any, measured: Any, seed: int) -> Iterator[tuple[Any, Any]]:
    from tvm.s_tir import meta_schedule as ms

    if measured.has_workload(kernel):
        for held in measured.get_top_k(measured.commit_workload(kernel), _MEASURED):
            yield held.trace, held.args_info
    context = ms.TuneContext(
        mod=kernel,
        target=target,
        space_generator=space_of_schedules(),
        search_strategy="replay-trace",
        num_threads=1,
        rand_state=seed,
    )
    context.pre_tuning(
        _DRAWN, _DRAWN, context.generate_design_space(), ms.database.MemoryDatabase(), ms.cost_model.RandomModel()
    )
    try:
        drawn = context.generate_measure_candidates() or []
    except Exception:  # some spaces end in an error of TVM's own: plain loops, then, which are counted
        return
    for candidate in drawn:
        yield candidate.sch.trace, candidate.args_info


def _is_right(kernel: Any, trace: Any, expected: Sequence[Any], target: Any) -> bool:
    import numpy as np

    try:
        found = _outputs(_scheduled(kernel, trace), target)
    except Exception:  # whatever it cannot do, the next one may
        return False
    for got, want in zip(found, expected, strict=True):
        largest = float(np.abs(want).max(initial=0.0))
        if not np.allclose(got, want, rtol=0, atol=_EQUAL * max(largest, 1e-30), equal_nan=True):
            return False
    return True


def _scheduled(kernel: Any, trace: Any) -> Any:
    from tvm import s_tir

    schedule = s_tir.Schedule(kernel)
    trace.apply_to_schedule(schedule, remove_postproc=False)
    return schedule.mod


def _outputs(module: Any, target: Any) -> list[Any]:
    """All arguments of a kernel after it ran on random values, in float64."""
    import tvm
    from tvm.s_tir.meta_schedule.arg_info import ArgInfo

    with target:
        library = tvm.tirx.build(module, target=target)
    arguments = values_for(ArgInfo.from_entry_func(module, remove_preproc=False))
    library["main"](*arguments)
    return [argument.numpy().astype("float64") for argument in arguments]
