"""TVM's kernels tuned by its own scheduler, MetaSchedule, within a number of seconds.

    tasks.json, request.json ─▶ python -m plait.serve.runtimes.tvm_tuner (a process of its own: a drawn schedule may crash)
                                       │  kernels of most arithmetic first, then always the one that takes longest now
                                       ▼
                                database_*.json in the record's folder, a line for every measured schedule

MetaSchedule's space of schedules, its evolutionary search and its database are used as they are. Its loop is not, for two reasons
found here: every worker of its builder first reads the tensor intrinsics of all GPUs, 15 s on one core, and is started anew for every few trials,
of which the default limit of 30 s then ends most; and it has no limit of time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Tuned", "space_of_schedules", "tune", "values_for", "without_intrinsics"]

_FIRST = 2  # schedules of every kernel before any gets more
_NEXT = 8
_HOPELESS = 4.0  # a schedule that takes so many times the best one's time is measured once
_MEASURE = 0.01  # seconds for each of three measurements
_RESTARTS = 8
_PATIENCE = 60.0  # seconds after its time that a process may need for what it is at


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning came to."""

    kernels: int = 0
    trials: int = 0
    seconds: float = 0.0


def without_intrinsics() -> None:
    """Keep MetaSchedule from importing the tensor intrinsics of every device, which schedules for a CPU in fp32 do not use."""
    sys.modules.setdefault("tvm.s_tir.tensor_intrin", types.ModuleType("tvm.s_tir.tensor_intrin"))


def space_of_schedules() -> Any:
    """MetaSchedule's for CPUs, without loops unrolled 512 times: they compile half as fast again, and won nothing here."""
    from tvm.s_tir import meta_schedule as ms

    unroll = ms.schedule_rule.ParallelizeVectorizeUnroll(
        max_jobs_per_core=16, max_vectorize_extent=64, unroll_max_steps=[0, 16, 64], unroll_explicit=True
    )
    rules = [
        unroll if isinstance(rule, ms.schedule_rule.ParallelizeVectorizeUnroll) else rule
        for rule in ms.schedule_rule.ScheduleRule.create("llvm")
    ]
    return ms.space_generator.PostOrderApply(sch_rules=rules, postprocs="llvm", mutator_probs="llvm")


def tune(
    groups: Sequence[Sequence[Any]],
    target: Mapping[str, Any],
    record: Path,
    scratch: Path,
    *,
    seconds: float,
    threads: int,
) -> Tuned:
    """Measure schedules of TVM's extracted tasks for `seconds`, and keep them in `record`; a crash costs one schedule.

    A group is the tasks of one library. What a kernel may win is counted in parts of its group's time, so that a small batch
    is tuned as much as a large one.
    """
    import tvm

    record.mkdir(exist_ok=True)
    tasks = {f"kernel_{i}_{j}": task for i, group in enumerate(groups) for j, task in enumerate(group)}
    functions = {name: task.dispatched[0]["main"] for name, task in tasks.items()}
    (scratch / "tasks.json").write_text(tvm.ir.save_json(tvm.IRModule(functions)), encoding="utf-8")
    before, begin, left_out = _lines(record), time.monotonic(), list[str]()
    for attempt in range(_RESTARTS):
        left = seconds - (time.monotonic() - begin)
        if left <= 0:
            break
        request = {
            "tasks": str(scratch / "tasks.json"),
            "at": str(scratch / "at.txt"),
            "record": str(record),
            "target": dict(target),
            "weights": {name: int(task.weight) for name, task in tasks.items()},
            "left_out": left_out,
            "seconds": left,
            "threads": threads,
            "seed": attempt + 1,
        }
        (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
        if _worker(scratch, left + _PATIENCE) == 0:
            break
        at = scratch / "at.txt"
        left_out.append(at.read_text(encoding="utf-8") if at.is_file() else "")
    return Tuned(len(tasks), _lines(record) - before, time.monotonic() - begin)


def _worker(scratch: Path, limit: float) -> int:
    """Exit status of the process that measures."""
    with (scratch / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "plait.serve.runtimes.tvm_tuner", str(scratch / "request.json")]
        try:
            return subprocess.run(command, stdout=log, stderr=log, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            return -1


def _lines(record: Path) -> int:
    path = record / "database_tuning_record.json"
    if not path.is_file():
        return 0
    with path.open(encoding="utf-8") as file:
        return sum(1 for _ in file)


class _Kernel:
    """One kernel's search."""

    def __init__(self, name: str, function: Any, weight: int, target: Any, database: Any, seed: int) -> None:
        import tvm
        from tvm.s_tir import analysis
        from tvm.s_tir import meta_schedule as ms

        self.name, self.weight, self.group = name, weight, name.split("_")[1]
        self.best = float("inf")
        self.trials = 0
        self.is_done = False
        self._target, self._database = target, database
        module = tvm.IRModule({"main": function})
        self.arithmetic = float(analysis.estimate_tir_flops(module)) * weight
        self._workload = database.commit_workload(module)
        space = space_of_schedules()
        # Small, since a generation is made on one core, and measured within seconds.
        search = ms.search_strategy.EvolutionarySearch(
            population_size=32, init_measured_ratio=0.5, init_min_unmeasured=8, genetic_num_iters=2
        )
        self._context = ms.TuneContext(
            mod=module,
            target=target,
            space_generator=space,
            search_strategy=search,
            task_name=name,
            num_threads=1,
            rand_state=seed,
        )
        self._model = ms.cost_model.RandomModel()
        self._designs = self._context.generate_design_space()
        self._is_begun = False

    @property
    def cost(self) -> float:
        """Seconds of all its calls."""
        return self.weight * min(self.best, 1e3)

    def one_round(self, most: int, stop: float) -> None:
        """Draw some schedules, measure at most so many of them until `stop`, and tell the search."""
        from tvm.s_tir.meta_schedule.runner import RunnerResult

        if not self._is_begun:
            self._context.pre_tuning(1 << 20, _NEXT, self._designs, self._database, self._model)
            self._is_begun = True
        found = self._context.generate_measure_candidates()
        if not found:
            self.is_done = True
            return
        results = []
        for number, candidate in enumerate(found):
            late = time.monotonic() > stop
            seconds, error = (None, "left away") if late or number >= most else self._measured(candidate)
            results.append(RunnerResult(None if seconds is None else [seconds], error))
        self._context.notify_runner_results(found, results)

    def _measured(self, candidate: Any) -> tuple[float | None, str | None]:
        """(seconds, error), one of them."""
        from tvm.s_tir.meta_schedule.database import TuningRecord

        self.trials += 1
        try:
            seconds = measured(candidate, self._target, self.best)
        except Exception as problem:  # a schedule that TVM cannot build is no candidate
            return None, str(problem)[:500]
        self.best = min(self.best, seconds)
        held = TuningRecord(candidate.sch.trace, self._workload, [seconds], self._target, candidate.args_info)
        self._database.commit_tuning_record(held)
        return seconds, None


def measured(candidate: Any, target: Any, best: float) -> float:
    """Seconds of a schedule on random values."""
    import tvm
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    with target:
        module = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(candidate.sch.mod)
        library = tvm.tirx.build(module, target=target)
    arguments = values_for(candidate.args_info)
    function = library["main"]
    function(*arguments)
    begin = time.perf_counter()
    function(*arguments)
    once = time.perf_counter() - begin
    if once > _HOPELESS * best:
        return once
    count = max(1, min(50, int(_MEASURE / max(once, 1e-6))))
    return float(min(library.time_evaluator("main", tvm.cpu(), number=count, repeat=3)(*arguments).results))


def _next(kernels: Sequence[_Kernel]) -> _Kernel | None:
    """One that was never measured, or what takes the largest part of its library's time; None where all are searched."""
    live = [kernel for kernel in kernels if not kernel.is_done]
    fresh = [kernel for kernel in live if not kernel.trials]
    if fresh or not live:
        return fresh[0] if fresh else None
    totals: dict[str, float] = {}
    for kernel in kernels:
        totals[kernel.group] = totals.get(kernel.group, 0.0) + kernel.cost
    # A long search lowers what is hoped from more of it.
    return max(live, key=lambda kernel: kernel.cost / totals[kernel.group] / (1 + kernel.trials / 32))


def values_for(arguments: Iterable[Any]) -> list[Any]:
    """TVM tensors for a kernel's arguments: random numbers and truth values, zeros where whole numbers may be places in a table."""
    import numpy as np
    import tvm

    generator = np.random.default_rng(0)
    found = []
    for info in arguments:
        shape, dtype = tuple(int(size) for size in info.shape), str(info.dtype)
        drawn: Any = generator.random(shape, dtype="float32")
        value = drawn if dtype.startswith("float") else drawn < 0.5 if dtype == "bool" else np.zeros(shape)
        found.append(tvm.runtime.tensor(np.asarray(value).astype(dtype)))
    return found


def main(path: str) -> int:
    """Tune what a request says until its time is over."""
    import logging

    logging.disable(logging.WARNING)
    without_intrinsics()
    import tvm
    from tvm.s_tir import meta_schedule as ms

    request = json.loads(Path(path).read_text(encoding="utf-8"))
    stop = time.monotonic() + request["seconds"]
    target = tvm.target.Target(request["target"])
    tvm.get_global_func("runtime.config_threadpool")(1, request["threads"])
    database = ms.database.JSONDatabase(work_dir=request["record"])
    module = tvm.ir.load_json(Path(request["tasks"]).read_text(encoding="utf-8"))
    at, weights = Path(request["at"]), request["weights"]
    kernels = []
    for variable, function in module.functions.items():
        name = variable.name_hint
        if name not in request["left_out"]:
            at.write_text(name, encoding="utf-8")
            kernels.append(_Kernel(name, function, weights[name], target, database, request["seed"] * 1000 + 1))
    order = sorted(kernels, key=lambda kernel: -kernel.arithmetic)
    while time.monotonic() < stop:
        kernel = _next(order)
        if kernel is None:
            break
        at.write_text(kernel.name, encoding="utf-8")
        kernel.one_round(_NEXT if kernel.trials else _FIRST, stop)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
