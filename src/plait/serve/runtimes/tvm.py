"""Apache TVM (Relax), in an environment of its own (`python -m plait.environments make tvm`).

    exported program ─▶ simplified ─▶ Relax, fused (`tvm_graph`) ─▶ tuned by MetaSchedule (`tvm_tuner`) ─▶ <entry>-b<batch>.so
                                                     records in tuning/          weights once, in weights.safetensors

Simplified is what TVM's importer gets wrong: sums over truth values, which torch promotes to whole numbers and TVM does not
(the masks of recent decoders); and whatever depends on no input and no weight is worked out here. Sizes are fixed, so that there
is a library for each rung of a ladder (`ladder`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import ServeError
from plait.serve.backend import Artefact, Runner
from plait.serve.runtimes import tvm_graph
from plait.serve.runtimes.ladder import Rung, inputs_at, rungs, served, unfit
from plait.serve.runtimes.own_environment import OwnEnvironment
from plait.serve.runtimes.simplify import simplified
from plait.serve.runtimes.tvm_schedules import chosen
from plait.serve.runtimes.tvm_spelled import SPELLED
from plait.serve.runtimes.tvm_tuner import Tuned, tune, without_intrinsics
from plait.serve.subject import Subject

if TYPE_CHECKING:
    import torch

__all__ = ["Tvm"]

_SECONDS = 120.0
"""For tuning all libraries of an export; PLAIT_TVM_SECONDS=N changes it, 0 leaves schedules as they are drawn, unmeasured."""


class Tvm(OwnEnvironment):
    """`<entry>-b<batch>.so`, `weights.safetensors`, `tuning/`."""

    name = "tvm"
    imports = ("tvm",)
    distributions = ("apache-tvm",)

    def refusal(self, subject: Subject, precision: str) -> str:
        """What is known before anything is tried."""
        why = unfit(subject) if len(subject.entries) > 1 else ""
        return f"tvm: {why}" if why else super().refusal(subject, precision)

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """A library for each entry point and batch, for this processor; tuned unless the weights are only moved ones."""
        del precision  # fp32 alone
        without_intrinsics()
        import torch
        import tvm

        threads = torch.get_num_threads()
        described = tvm_graph.this_processor(threads)
        target = tvm.target.Target(described)
        steps = [(name, rung) for name in subject.entries for rung in rungs(subject, name)]
        seconds = 0.0 if subject.moved else _seconds()
        weights: dict[str, torch.Tensor] = {}
        order: dict[str, list[str]] = {}
        record, tuned = folder / "tuning", Tuned()
        laid_out: list[str] = []
        refused = plain = 0
        with tempfile.TemporaryDirectory(prefix="plait-tvm-") as text, tvm_graph.quiet():
            modules = {}
            for name, rung in steps:
                module, held = _module(subject, name, rung, target)
                modules[f"{name}-{rung.name}"] = module
                order[f"{name}-{rung.name}"] = [_keep(weights, value) for value in tvm_graph.arrays(held)]
            tasks = {key: tvm_graph.tasks_of(module, target) for key, module in modules.items()}
            if seconds > 0:
                groups = list(tasks.values())
                tuned = tune(groups, described, record, Path(text), seconds=seconds, threads=threads)
            for key, module in modules.items():
                schedules = chosen(tasks[key], target, record)
                refused, plain = refused + schedules.refused, plain + schedules.plain
                if tvm_graph.library(module, target, schedules.database, folder / f"{key}.so"):
                    laid_out.append(key)
        _save(weights, folder / "weights.safetensors")
        return {"parameters": order, "laid_out": laid_out, "note": _note(tuned, threads, refused, plain)}

    def load(self, artefact: Artefact) -> Runner:
        """A virtual machine for each rung of the ladder, made when it is first needed."""
        import torch
        import tvm
        from safetensors.torch import load_file
        from tvm import relax

        order = _order(artefact.facts)
        held = {
            key: tvm.runtime.tensor(value.numpy())
            for key, value in load_file(artefact.folder / "weights.safetensors").items()
        }
        tvm.get_global_func("runtime.config_threadpool")(1, artefact.threads)
        machines: dict[tuple[str, Rung], Any] = {}
        wanted = [getattr(torch, spec.dtype) for spec in artefact.entry.outputs]

        def graph(name: str, rung: Rung, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            if (name, rung) not in machines:
                library = _loaded(artefact.folder / f"{name}-{rung.name}.so")
                machine = relax.VirtualMachine(library, tvm.cpu())
                parameters = [held[key] for key in order[name][rung]]
                if f"{name}-{rung.name}" in artefact.facts.get("laid_out", ()):
                    parameters = list(machine[tvm_graph.PREPARE](parameters))
                machines[name, rung] = machine["main"], parameters
            function, parameters = machines[name, rung]
            found = function(*(tvm.runtime.tensor(v.detach().contiguous().numpy()) for v in inputs), *parameters)
            outputs = [found] if hasattr(found, "numpy") else list(found)
            return [torch.from_numpy(o.numpy()).to(dtype) for o, dtype in zip(outputs, wanted, strict=True)]

        name = artefact.entry.name
        if name not in order:
            raise ServeError(f"tvm: the artefact has no library of {name}")
        return served(artefact.entry, list(order[name]), graph)


def _loaded(path: Path) -> Any:
    """The library, by a name that was never used before.

    Under a name that this process knows, the system gives the library that it loaded first, whatever the file holds by now: the one
    of moved weights in place of the artefact's.
    """
    import tvm

    with tempfile.TemporaryDirectory(prefix="plait-tvm-") as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        return tvm.runtime.load_module(str(copy))


def _seconds() -> float:
    """What is asked for tuning."""
    text = os.environ.get("PLAIT_TVM_SECONDS", "")
    try:
        found = float(text or _SECONDS)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise ServeError(f"PLAIT_TVM_SECONDS={text} is no number of seconds", hint="0 exports without tuning")
    return found


def _module(subject: Subject, name: str, rung: Rung, target: Any) -> tuple[Any, list[Any]]:
    from plait.serve.runtimes.complex_pairs import in_pairs
    from plait.serve.runtimes.scattering import without_scattering

    program = without_scattering(in_pairs(subject.program(name)))
    program = simplified(program, inputs_at(subject, name, rung), SPELLED)
    return tvm_graph.lowered(*tvm_graph.imported(program), target)


def _note(tuned: Tuned, threads: int, refused: int, plain: int) -> str:
    how = "not tuned: schedules as they are drawn"
    if tuned.trials:
        how = f"{tuned.kernels} kernels tuned by MetaSchedule for {threads} threads: {tuned.trials} schedules measured"
        how += f" in {tuned.seconds:.0f} s"
    parts = [how]
    if refused:
        parts.append(f"{refused} schedules refused, since they did not compute what plain loops do")
    if plain:
        parts.append(f"{plain} kernels left as plain loops")
    return "; ".join(parts)


def _keep(weights: dict[str, torch.Tensor], value: torch.Tensor) -> str:
    """The value's key among the weights; the same values are stored once."""
    held = value.contiguous()
    digest = hashlib.sha256(held.numpy().tobytes() + str((held.dtype, tuple(held.shape))).encode()).hexdigest()[:24]
    weights[digest] = held.clone()
    return digest


def _save(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(weights), path)


def _order(facts: Mapping[str, Any]) -> dict[str, dict[Rung, list[str]]]:
    """Entry point -> rung -> keys of the parameters, checked: it comes from a file."""
    found: dict[str, dict[Rung, list[str]]] = {}
    try:
        for key, value in facts["parameters"].items():
            entry, _, rung = str(key).rpartition("-")
            found.setdefault(entry, {})[Rung.parse(rung)] = [str(item) for item in value]
    except (KeyError, AttributeError, TypeError, ValueError) as problem:
        raise ServeError(f"tvm: the manifest's facts are malformed ({json.dumps(str(problem))})") from None
    return found
