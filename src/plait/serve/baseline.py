"""Eager, the honest one: the user's own module, rebuilt in this process with the exported weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from io import StringIO
from typing import TYPE_CHECKING, Any

from plait.serve.backend import Runner

if TYPE_CHECKING:
    import torch

    from plait.serve.subject import Subject

__all__ = ["compiled", "eager"]


def eager(subject: Subject, entry: str = "forward") -> tuple[Runner, Any, str]:
    """(runner, module, which): the user's own module (`own`), or where it cannot be rebuilt the program's (`exported`)."""
    if entry == "forward" and subject.recipe:
        # Another environment lacks what the user's code imports: then the program stands in.
        with suppress(Exception):
            return *_own(subject.recipe, subject), "own"
    module = subject.program(entry).module(check_guards=False)
    return _runner(module), module, "exported"


def _runner(module: Any) -> Runner:
    import torch

    def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            outputs: Sequence[torch.Tensor] = module(*inputs)
        return outputs

    return run


def _own(recipe: Mapping[str, Any], subject: Subject) -> tuple[Runner, Any]:
    import torch

    from plait.capture.target import load_target
    from plait.capture.trace import call_model
    from plait.serve.entry import Flat
    from plait.serve.source import Source, built

    before = os.getcwd()  # noqa: PTH109
    os.chdir(recipe["cwd"])
    try:
        with redirect_stderr(StringIO()):
            job = load_target(recipe["target"])
            module = job.model if isinstance(job.model, torch.nn.Module) else built(job, 0)
    finally:
        os.chdir(before)
    state = {name.removeprefix("model."): value for name, value in subject.program().state_dict.items()}
    module.load_state_dict(state, strict=False)
    module.eval()
    source = Source(job, module, "", "", False, {}, recipe.get("label", ""), recipe.get("shifts", False))
    flat = Flat.of(module, source.served(job.batch))

    def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return flat.flatten_outputs(call_model(module, flat.inputs(inputs)))

    _refuse_other(subject, run)
    return run, module


def _refuse_other(subject: Subject, run: Runner) -> None:
    """Raise where the rebuilt module is not the exported one (a target that gives another model every time)."""
    from plait.serve.accuracy import PARITY, difference

    entry = subject.entries["forward"]
    sample = entry.samples[0]
    gap = difference([s.name for s in entry.outputs], subject.outputs(sample), run(subject.inputs(sample)))
    if gap.max_rel > PARITY:
        raise ValueError("the rebuilt module gives other outputs")


def compiled(runner: Runner) -> Runner:
    """The same function under torch.compile, one compilation for each shape."""
    import torch

    torch._dynamo.reset()
    found: Runner = torch.compile(runner, dynamic=False)
    return found
