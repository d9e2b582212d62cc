"""An exported program as a Relax module, made ready for fast kernels.

imported ─▶ what depends on weights alone worked out now (weights turned, batch norms folded together) ─▶ operators lowered, fused
         ─▶ scheduled: by the record of a tuning, or by one draw from MetaSchedule's space ─▶ weights laid out as the schedules want
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = [
    "PREPARE",
    "SPELLED",
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


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    import torch

    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + torch.erf(x * 0.7071067811865476))


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    import torch

    return 1 / (1 + torch.exp(-x))


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * _sigmoid(x)


def _index(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """x[:, i, j]: of whole numbers for neighbouring dimensions, by one lookup in those dimensions laid together."""
    import torch

    spread: Any = torch.broadcast_tensors
    places = [place for place, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    is_block = places == list(range(places[0], places[0] + len(places)))
    if not is_block or any(index.dtype not in (torch.int64, torch.int32) for index in given):
        return torch.ops.aten.index.Tensor(x, indices)  # type: ignore[no-any-return]
    first, last = places[0], places[-1]
    together = torch.zeros((), dtype=torch.int64)
    for place, index in zip(places, spread(*given), strict=True):
        size = x.shape[place]
        together = together * size + torch.where(index < 0, index + size, index)
    found = x.flatten(first, last).index_select(first, together.reshape(-1))
    return found.reshape(*x.shape[:first], *together.shape, *x.shape[last + 1 :])


def _floor_divide(x: torch.Tensor, divisor: Any) -> torch.Tensor:
    import torch

    is_number = not isinstance(divisor, torch.Tensor)
    return torch.floor_divide(x, torch.full((1,), divisor, dtype=x.dtype) if is_number else divisor)


def _amax(x: torch.Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> torch.Tensor:
    import torch

    for place in sorted((d % x.dim() for d in dim or range(x.dim())), reverse=True):
        x = torch.max(x, place, keepdim=keepdim).values
    return x


def _amin(x: torch.Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> torch.Tensor:
    return -_amax(-x, dim, keepdim)


def _clamp(x: torch.Tensor, min: Any = None, max: Any = None) -> torch.Tensor:  # noqa: A002  torch's own names
    """Of whole numbers with a limit on one side only: TVM takes infinity for the other one."""
    import torch

    if x.is_floating_point():
        return torch.clamp(x, min, max)
    if min is not None:
        x = torch.maximum(x, torch.full((1,), min, dtype=x.dtype))
    return x if max is None else torch.minimum(x, torch.full((1,), max, dtype=x.dtype))


def _any(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).any(0)


def _least(x: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    values, indices = torch.max(-x, dim, keepdim=keepdim)
    return -values, indices


SPELLED: dict[str, Callable[..., Any]] = {
    "aten.amax.default": _amax,
    "aten.amin.default": _amin,
    "aten.any.default": _any,
    "aten.clamp.default": _clamp,
    "aten.min.dim": _least,
    "aten.floor_divide.default": _floor_divide,
    "aten.gelu.default": _gelu,
    "aten.sigmoid.default": _sigmoid,
    "aten.silu.default": _silu,
    "aten.index.Tensor": _index,
}
"""Operators by what TVM computes in vectors, where by their own names they call the C library for every number; an indexing
whose shape its importer gets wrong; a division by a number to which it gives another type; and some that it has no name for."""


def this_processor(threads: int) -> dict[str, Any]:
    """TVM's target for this machine."""
    import tvm

    return {"kind": "llvm", "mcpu": tvm.get_global_func("target.llvm_get_system_cpu")(), "num-cores": threads}


def imported(program: torch.export.ExportedProgram) -> tuple[Any, list[Any]]:
    """(Relax module whose main takes inputs, then weights; the weights)."""
    from tvm.relax.frontend import detach_params
    from tvm.relax.frontend.torch import from_exported_program

    module, parameters = detach_params(from_exported_program(program, keep_params_as_input=True))
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
