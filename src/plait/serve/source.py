"""What a user hands over to be exported, as a built model in eval mode with its weights, and inputs as they are served."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait.capture.arguments import nearest
from plait.capture.job import Job
from plait.capture.trace import call_model, in_short, tied_names
from plait.errors import CheckpointError, PlaitError, TargetError

__all__ = ["Source", "eval_mode", "source_of"]

RUN = "run.json"
_SHIFT = "prepare_decoder_input_ids_from_labels"  # what encoder-decoders of transformers call it


@dataclass
class Source:
    """A model to export."""

    job: Job
    module: nn.Module
    name: str
    text: str
    """Where it comes from, for the manifest."""
    random: bool
    """Whether its weights are freshly drawn."""
    recipe: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    """The input that is left out, because it is there for the model's own loss alone."""
    shifts: bool = False
    """Whether the decoder's inputs are made of the label."""
    not_in_checkpoint: list[str] = field(default_factory=list)
    """Parameters that the checkpoint does not hold, because no plan's graph used them."""

    def served(self, batch: tuple[Any, Any]) -> Any:
        """A batch's inputs as they are served."""
        return _without(self.module, *batch, self.label, self.shifts)

    @property
    def serving_job(self) -> Job:
        """The job with the served inputs as its batch and no targets."""
        return replace(self.job, batch=(self.served(self.job.batch), None))


def source_of(what: Any, *, target: str | None = None, inputs: Any = None) -> Source:
    """The source of a TARGET, a run directory, a Job or a module.

    `target` says what a run directory trained where it does not say so itself; `inputs` are a module's sample inputs.

    Raises:
        TargetError, CheckpointError: there is no such thing, or it does not fit.
    """
    if isinstance(what, nn.Module):
        if inputs is None:
            raise TargetError(
                "export: a module needs sample inputs",
                hint="plait.export(model, inputs=..., to=...), or hand over a Job",
            )
        what = Job(what, batch=(inputs, None))
    if isinstance(what, Job):
        return _of_job(what, what.name or type(what.model).__name__, "a Job in Python", {})
    text = str(what)
    folder = Path(text)
    if os.path.isdir(text):  # noqa: PTH112 - Path.is_dir raises for a target longer than a file name may be
        return _of_run(folder, target)
    if ":" not in text:
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        raise TargetError(
            f"export {text!r}: no such run directory, and no target{nearest(folder.name, near)}",
            hint="give a TARGET such as examples/gpt.py:job, or the directory of a `plait train`",
        )
    from plait.capture.target import load_target

    return _of_job(load_target(text), "", text, {"target": text, "cwd": str(Path.cwd())})


def _of_job(job: Job, name: str, text: str, recipe: dict[str, Any]) -> Source:
    if isinstance(job.model, nn.Module):
        module, random = job.model, False
    else:
        with _building(text):
            _refuse_too_large(job)
            module = built(job, 0)
            random = _differs(module, built(job, 1))
    name = name or job.name or type(module).__name__
    return _source(job, module, name, text, random, recipe)


@contextmanager
def _building(text: str) -> Iterator[None]:
    """What the user's own function raises is said with its line."""
    try:
        yield
    except PlaitError:
        raise
    except Exception as problem:
        raise TargetError(
            f"export {text}: the Job's model() raised {in_short(problem.__cause__ or problem, problem)}"
        ) from None


def built(job: Job, seed: int) -> nn.Module:
    """The job's model by its function, on the CPU.

    Raises:
        TargetError: the function gives something else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: Any = job.model()
    if not isinstance(module, nn.Module):
        raise TargetError(f"job: model() gave a {type(module).__name__}, not a torch.nn.Module")
    return module


def _refuse_too_large(job: Job) -> None:
    """Exporting holds about four copies of the weights at a time: two here, two in a runtime's process."""
    from plait.capture.build import build

    try:
        module = build(job, seed=0, values=False).module
    except TargetError as problem:
        if "no parameters" in problem.message:
            return  # nothing to train, and something to serve
        raise
    need = 4 * sum(p.numel() * p.element_size() for p in module.parameters())
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        available = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return  # a system that does not say
    if need > available:
        raise TargetError(
            f"export: the model needs about {need / 2**30:.1f} GiB while it is exported, {available / 2**30:.1f} GiB are free",
            hint="export a smaller one, or on a machine with more memory",
        )


def _differs(one: nn.Module, other: nn.Module) -> bool:
    """Whether most of the parameters' values depend on the seed: a model that loads its weights is not random."""
    changed = total = 0
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        total += a.numel()
        changed += 0 if a.shape == b.shape and torch.equal(a, b) else a.numel()
    return changed > total / 2


def _of_run(folder: Path, target: str | None) -> Source:
    from plait.run.checkpoint import latest

    directory = latest(folder)
    if directory is None:
        raise CheckpointError(
            f"export {folder}: there is no complete checkpoint in it",
            hint="give the --run-dir of a `plait train` that has saved one (in checkpoints/step-...)",
        )
    cwd = Path.cwd()
    if target is None:
        target, cwd = _trained_target(folder)
    from plait.capture.target import load_target

    with _inside(cwd):
        job = load_target(target)
    with _building(target):
        module = built(job, 0) if not isinstance(job.model, nn.Module) else copy.deepcopy(job.model)
    missing = _load(module, directory, target)
    recipe = {"target": target, "cwd": str(cwd)}
    source = _source(job, module, folder.resolve().name, f"{folder} ({target}, {directory.name})", False, recipe)
    source.not_in_checkpoint = missing
    return source


def _trained_target(folder: Path) -> tuple[str, Path]:
    try:
        data = json.loads((folder / RUN).read_text(encoding="utf-8"))
        target, cwd = data["target"], data["cwd"]
        if not isinstance(target, str) or not isinstance(cwd, str):
            raise TypeError("target and cwd must be text")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise CheckpointError(
            f"export {folder}: {RUN} does not say what was trained ({problem})",
            hint="add --target with the TARGET that `plait train` was given",
        ) from None
    return target, Path(cwd) if Path(cwd).is_dir() else Path.cwd()


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _load(module: nn.Module, directory: Path, target: str) -> list[str]:
    """Fill the module from a checkpoint of any plan; gives the parameters it has no values for."""
    from plait.run.checkpoint import iterate_whole

    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    aliases = tied_names(module)
    left = set(dict(module.named_parameters()))
    with torch.no_grad():
        for name, value in iterate_whole(directory):
            first = aliases.get(name, name)
            tensor = own.get(first, own.get(name))
            if tensor is None or tensor.shape != value.shape:
                found = "no such parameter" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise CheckpointError(
                    f"checkpoint {directory}: it is of another model: {name} has shape {tuple(value.shape)}, "
                    f"{target} has {found}{nearest(name, own) if tensor is None else ''}",
                    hint="give the TARGET, with its arguments, that was trained",
                )
            tensor.copy_(value)
            left -= {name, first}
    return sorted(left)


def _source(job: Job, module: nn.Module, name: str, text: str, random: bool, recipe: dict[str, Any]) -> Source:
    with eval_mode(module):
        label, shifts = _label(job, module)
    return Source(job, module, name, text, random, recipe, label, shifts)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; every part gets back the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _label(job: Job, module: nn.Module) -> tuple[str, bool]:
    """The input that is there for the model's own loss alone, if there is one; whether the decoder's inputs come from it.

    Where the model computes its loss itself, an input that equals the targets and that it runs without is a label. An
    encoder-decoder cannot do without, and gets the decoder's inputs that it would make of the labels.
    """
    inputs, targets = job.batch
    if job.loss is not None or not isinstance(inputs, dict) or not isinstance(targets, torch.Tensor):
        return "", False
    equal = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and torch.equal(v, targets)]
    for shifts in (False, True) if _can_shift(module) else (False,):
        for label in equal:
            with suppress(Exception):  # an input that the model needs is no label
                call_model(module, _without(module, inputs, targets, label, shifts))
                return label, shifts
    return "", False


def _can_shift(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return hasattr(module, _SHIFT) or (
        bool(getattr(config, "is_encoder_decoder", False))
        and isinstance(getattr(config, "decoder_start_token_id", None), int)
    )


def _shifted(module: Any, targets: torch.Tensor) -> torch.Tensor:
    """The decoder's inputs for labels: by the model's own function, else a place to the right, after the token that starts."""
    if hasattr(module, _SHIFT):
        found: torch.Tensor = getattr(module, _SHIFT)(targets)
        return found
    moved = targets.roll(1, -1)
    moved[..., 0] = module.config.decoder_start_token_id
    padding = getattr(module.config, "pad_token_id", None)
    return moved.masked_fill(moved == -100, 0 if padding is None else padding)  # labels that do not count


def _without(module: nn.Module, inputs: Any, targets: Any, label: str, shifts: bool) -> Any:
    if not label:
        return inputs
    served = {key: value for key, value in inputs.items() if key != label}
    return {**served, "decoder_input_ids": _shifted(module, targets)} if shifts else served
