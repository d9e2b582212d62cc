"""Apache TVM (Relax), in an environment of its own (`python -m plait.environments make tvm`).

    exported program ─▶ simplified ─▶ Relax ─▶ (tuned by MetaSchedule) ─▶ <entry>-b<batch>.so, one for each batch of a ladder
                                                     └─ record kept in tuning/          weights once, in weights.safetensors

Simplified is what TVM's importer gets wrong: sums over truth values, which torch promotes to whole numbers and TVM does not
(the masks of recent decoders); and whatever depends on no input and no weight is worked out here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import ServeError
from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.ladder import at_batch, filled_up, ladder, sample_of
from plait.serve.own_environment import interpreter_of, missing_in
from plait.serve.simplify import simplified
from plait.serve.subject import Subject

if TYPE_CHECKING:
    import torch

__all__ = ["Tvm"]

_TRIALS = 0
"""Of all operators together, for each batch of the ladder. 0 leaves it untuned, which is slow; PLAIT_TVM_TRIALS=N tunes. Not the
default, since on two busy cores no trial was measured within four minutes, and `plait export` has a limit."""
_TRIALS_EACH = 8


class Tvm(Backend):
    """`<entry>-b<batch>.so`, `weights.safetensors`, `tuning/`."""

    name = "tvm"
    imports = ("tvm",)
    distributions = ("apache-tvm",)

    def interpreter(self) -> str:
        """That of the environment `tvm`."""
        return interpreter_of("tvm")

    def missing(self) -> str:
        """The command that makes the environment."""
        return missing_in("tvm", self.imports)

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """A library for each entry point and batch, for this processor; tuned unless the weights are only moved ones."""
        del precision  # fp32 alone
        weights: dict[str, torch.Tensor] = {}
        order: dict[str, list[str]] = {}
        trials = 0 if subject.moved else int(os.environ.get("PLAIT_TVM_TRIALS", _TRIALS))
        tuned = 0
        for name, entry in subject.entries.items():
            lengths = [dim for dim in entry.dims if dim != "batch" and dim not in subject.closed]
            if lengths:
                raise ValueError(f"tuned graphs have fixed sizes: {', '.join(lengths)}")
            program = subject.program(name)
            inputs = tuple(subject.inputs(sample_of(subject, entry), name))
            for size in ladder(subject, entry):
                module, parameters = _imported(simplified(program, at_batch(inputs, entry, size)))
                order[f"{name}-b{size}"] = [_keep(weights, parameter) for parameter in parameters]
                with _quiet():
                    tuned += _compiled(module, folder / f"{name}-b{size}.so", folder / "tuning", trials)
        _save(weights, folder / "weights.safetensors")
        note = (
            f"{tuned} kernels tuned by MetaSchedule, {trials} trials a batch"
            if trials
            else "not tuned: PLAIT_TVM_TRIALS=N"
        )
        return {"parameters": order, "note": note}

    def load(self, artefact: Artefact) -> Runner:
        """A virtual machine for each batch of the ladder, made when it is first needed."""
        import torch
        import tvm
        from safetensors.torch import load_file
        from tvm import relax

        name, entry = artefact.entry.name, artefact.entry
        order = _order(artefact.facts, name)
        held = {
            key: tvm.runtime.tensor(value.numpy())
            for key, value in load_file(artefact.folder / "weights.safetensors").items()
        }
        tvm.get_global_func("runtime.config_threadpool")(1, artefact.threads)
        machines: dict[int, Any] = {}
        wanted = [getattr(torch, spec.dtype) for spec in entry.outputs]
        batched, open_outputs = (
            [bool(s.shape) and s.shape[0] == "batch" for s in side] for side in (entry.inputs, entry.outputs)
        )

        def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            sizes = [len(value) for value, is_batched in zip(inputs, batched, strict=True) if is_batched]
            have = sizes[0] if sizes else min(order)
            size = next((step for step in sorted(order) if step >= have), None)
            if size is None:
                raise ValueError(f"a batch of {have}, and the libraries serve at most {max(order)}")
            if size not in machines:
                library = tvm.runtime.load_module(str(artefact.folder / f"{name}-b{size}.so"))
                machines[size] = (relax.VirtualMachine(library, tvm.cpu())["main"], [held[key] for key in order[size]])
            function, parameters = machines[size]
            filled = [
                filled_up(value, size) if is_batched and len(value) < size else value
                for value, is_batched in zip(inputs, batched, strict=True)
            ]
            found = function(
                *(tvm.runtime.tensor(value.detach().contiguous().numpy()) for value in filled), *parameters
            )
            outputs = [found] if hasattr(found, "numpy") else list(found)
            tensors = [torch.from_numpy(o.numpy()).to(dtype) for o, dtype in zip(outputs, wanted, strict=True)]
            return [
                t[:have] if is_open and have < size else t for t, is_open in zip(tensors, open_outputs, strict=True)
            ]

        return run


def _imported(program: torch.export.ExportedProgram) -> tuple[Any, list[torch.Tensor]]:
    """(Relax module whose main takes inputs, then parameters; the parameters)."""
    import torch
    from tvm.relax.frontend import detach_params
    from tvm.relax.frontend.torch import from_exported_program

    with _quiet():
        module, parameters = detach_params(from_exported_program(program, keep_params_as_input=True))
    return module, [torch.from_numpy(value.numpy()) for value in parameters.get("main", [])]


def _compiled(module: Any, library: Path, record: Path, trials: int) -> int:
    """Write the library, tuned with so many trials, and give the number of kernels in the record."""
    import tvm
    from tvm import relax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = tvm.get_global_func("target.llvm_get_system_cpu")()
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": cores})
    if trials:
        record.mkdir(exist_ok=True)
        with target, tvm.transform.PassContext(opt_level=3):
            module = relax.get_pipeline("zero")(module)
            _tune(module, target, record, trials)
            module = relax.transform.MetaScheduleApplyDatabase(str(record))(module)
    tvm.compile(module, target=target).export_library(str(library))
    lines = record / "database_tuning_record.json"
    return sum(1 for _ in lines.open(encoding="utf-8")) if lines.is_file() else 0


def _tune(module: Any, target: Any, record: Path, trials: int) -> None:
    """Measure schedules of every kernel and keep them in the record.

    Drawn at random from MetaSchedule's space, without its evolutionary search: that spends minutes a kernel on two cores before
    the first measurement.
    """
    from tvm.s_tir.meta_schedule import relax_integration

    relax_integration.tune_relax(
        module,
        {},
        target,
        str(record),
        max_trials_global=trials,
        max_trials_per_task=_TRIALS_EACH,
        num_trials_per_iter=_TRIALS_EACH,
        strategy="replay-trace",
        cost_model="random",
    )


def _keep(weights: dict[str, torch.Tensor], value: torch.Tensor) -> str:
    """The value's key among the weights; the same values are stored once."""
    held = value.contiguous()
    digest = hashlib.sha256(held.numpy().tobytes() + str((held.dtype, tuple(held.shape))).encode()).hexdigest()[:24]
    weights[digest] = held.clone()
    return digest


def _save(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(weights), path)


def _order(facts: Mapping[str, Any], name: str) -> dict[int, list[str]]:
    """Batch -> keys of the parameters, checked: it comes from a file."""
    try:
        found = {}
        for key, value in facts["parameters"].items():
            entry, _, size = str(key).rpartition("-b")
            if entry == name:
                found[int(size)] = [str(item) for item in value]
    except (KeyError, AttributeError, TypeError, ValueError) as problem:
        raise ServeError(f"tvm: the manifest's facts are malformed ({json.dumps(str(problem))})") from None
    if not found:
        raise ServeError(f"tvm: the artefact has no library of {name}")
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
