"""An exported program as a Relax module, made ready for fast kernels.

imported ─▶ what depends on weights alone worked out now (weights turned, batch norms folded together) ─▶ operators lowered, fused
         ─▶ scheduled: by the record of a tuning, or by one draw from MetaSchedule's space ─▶ weights laid out as the schedules want
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = [
    "PREPARE",
    "arrays",
    "imported",
    "library",
    "lowered",
    "quiet",
    "tasks_of",
    "this_processor",
]

PREPARE = "main_transform_params"
"""The library's function that lays weights out as its kernels want them; absent where they want them as they are."""


def this_processor(threads: int) -> dict[str, Any]:
    """TVM's target for this machine."""
    import tvm

    return {"kind": "llvm", "mcpu": tvm.get_global_func("target.llvm_get_system_cpu")(), "num-cores": threads}


def imported(program: torch.export.ExportedProgram) -> tuple[Any, list[Any]]:
    """(Relax module whose main takes inputs, then weights; the weights).

    Raises:
        NotImplementedError: the importer lacks operators, which are named as torch names them.
    """
    from tvm.relax.frontend import detach_params
    from tvm.relax.frontend.torch import from_exported_program

    try:
        whole = from_exported_program(program, keep_params_as_input=True)
    except AssertionError as problem:
        lacking = re.findall(r"'(\w+\.\w+)'", str(problem))
        if not lacking:
            raise
        raise NotImplementedError(f"TVM's importer lacks {', '.join(f'aten.{one}' for one in lacking)}") from None
    module, parameters = detach_params(whole)
    return module, list(parameters.get("main", []))


def lowered(module: Any, weights: Sequence[Any], target: Any) -> tuple[Any, list[Any]]:
    """(module of fused loops without schedules, the weights it takes)."""
    import tvm
    from tvm import relax

    transform = relax.transform
    images = {"relax.nn.conv2d": ["NHWC", "HWIO"]}  # channels innermost: their loops become vectors
    with target, tvm.transform.PassContext(opt_level=3):
        before = [
            transform.DecomposeOpsForInference(),
            transform.CanonicalizeBindings(),
            transform.ConvertLayout(images),
            transform.LiftTransformParams(),
        ]
        module = tvm.transform.Sequential(before)(module)
        names = [variable.name_hint for variable in module.get_global_vars()]
        if PREPARE in names:
            once = tvm.compile(tvm.IRModule({PREPARE: module[PREPARE]}), target=target)
            weights = list(relax.VirtualMachine(once, tvm.cpu())[PREPARE](list(weights)))
            module = tvm.IRModule({"main": module["main"]})
        after = [
            transform.FastMathTransform(),  # exp, erf, tanh by polynomials: 1e-6 at most, by comparison with numpy's
            relax.get_pipeline("zero"),
            transform.AttachAttrLayoutFreeBuffers(),
        ]
        return _tables_as_they_are(tvm.transform.Sequential(after)(module)), list(weights)


def _tables_as_they_are(module: Any) -> Any:
    """Without leave to lay out anew what is read at places that other values give.

    TVM takes the places that it sees in the loop for all there are: of a table of 19 rows it kept 8, and read beyond its end.
    """
    for variable, function in module.functions.items():
        attributes = function.attrs
        if attributes is not None and "layout_free_buffers" in attributes and _reads_by_values(function):
            module.update_func(variable, function.without_attr("layout_free_buffers"))
    return module


def _reads_by_values(function: Any) -> bool:
    import tvm_ffi
    from tvm.ir import TensorLoad

    inner: list[Any] = []

    def look(load: Any) -> None:
        for index in load.indices:
            tvm_ffi.structural.structural_walk(index, (TensorLoad, inner.append))

    tvm_ffi.structural.structural_walk(function.body, (TensorLoad, look))
    return bool(inner)


def tasks_of(module: Any, target: Any) -> list[Any]:
    """The different kernels to schedule, each with the number of its calls as `weight`.

    Not those that divide whole numbers by values: a kernel is tried on made-up ones, and a division by zero ends the process.
    """
    from tvm.s_tir.meta_schedule import relax_integration

    tasks = relax_integration.extract_tasks(module, target)
    return [task for task in tasks if not any(map(_divides_by_values, task.dispatched[0].functions.values()))]


def _divides_by_values(function: Any) -> bool:
    import tvm_ffi
    from tvm import tirx
    from tvm.ir import TensorLoad

    divisors: list[Any] = []

    def look(division: Any) -> None:
        if "int" in str(division.ty):
            tvm_ffi.structural.structural_walk(division.b, (TensorLoad, divisors.append))

    for kind in (tirx.Div, tirx.FloorDiv, tirx.Mod, tirx.FloorMod):
        tvm_ffi.structural.structural_walk(function.body, (kind, look))
    return bool(divisors)


def library(module: Any, target: Any, database: Any, path: Path) -> bool:
    """Write the library of a lowered module with the schedules of a database; whether it has the function `PREPARE`."""
    import tvm
    from tvm import relax

    transform = relax.transform
    with target, database, tvm.transform.PassContext(opt_level=3):
        after = [
            transform.MetaScheduleApplyDatabase(),
            transform.SplitLayoutRewritePreproc(),
            transform.LiftTransformParams(),
            transform.FoldConstant(),
        ]
        module = tvm.transform.Sequential(after)(module)
        tvm.compile(module, target=target).export_library(str(path))
    return PREPARE in [variable.name_hint for variable in module.get_global_vars()]


def arrays(weights: Sequence[Any]) -> list[torch.Tensor]:
    """TVM's tensors as torch's."""
    import torch

    return [torch.from_numpy(weight.numpy()) for weight in weights]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TVM's notes on every pass and trial stay out of the log."""
    import logging
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
