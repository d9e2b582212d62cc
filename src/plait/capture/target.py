"""TARGET -> Job: a function in a file or a module, a transformers architecture, or an ONNX file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import random
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from plait.capture.arguments import TargetText, convert, nearest
from plait.capture.job import Job
from plait.errors import PlaitError, TargetError

__all__ = ["check_target", "load_target"]


def load_target(text: str) -> Job:
    """The Job that a TARGET stands for: `path/file.py:function?key=value`, `package.module:function`, `hf:MODEL_TYPE`,
    `onnx:FILE.onnx`.

    The function's arguments are converted to the type of their annotation or default value, and its random numbers (torch's,
    numpy's, Python's) are the same in every process that loads the target, unless it seeds them itself. While the file is loaded
    and its function runs, its folder (the working directory for a module) can be imported from; not afterwards.

    Raises:
        TargetError: there is no such file, module or function, an argument is wrong, the function raises (its
            line is shown) or returns something else.
    """
    target = TargetText.parse(text)
    if target.place.startswith("hf:"):
        from plait.capture.huggingface import transformers_job

        return transformers_job(target.place.removeprefix("hf:"), target.arguments)
    if target.place.startswith("onnx:"):
        from plait.capture.onnx.job import onnx_job

        return onnx_job(target.place.removeprefix("onnx:"), target.arguments)
    place, name = _place_and_name(target.place)
    is_file = _is_file(place)
    with _importable(Path(place).resolve().parent if is_file else Path.cwd()):
        with _same_draws():
            module = _load_file(Path(place)) if is_file else _load_module(place)
        function = _function(module, name, place)
        arguments = _bind(function, target.arguments, f"target {place}:{name}")
        try:
            with _same_draws():  # again: a module that was loaded before draws nothing
                job = function(**arguments)
        except PlaitError:
            raise
        except (Exception, SystemExit) as problem:
            _raised(problem, f"{place}:{name}", module.__file__)
    if not isinstance(job, Job):
        shown = "None" if job is None else f"a {type(job).__name__}"
        raise TargetError(
            f"target {place}:{name} returned {shown}, not a plait.Job",
            hint="end the function with `return plait.Job(model, loss=..., batch=(inputs, targets))`",
        )
    if not job.name:
        job.name = name if name != "job" else Path(place).stem.rpartition(".")[2]
    return job


def check_target(text: str) -> None:
    """Refuse what can be refused without importing torch or the user's code: a malformed TARGET, a file that is not there.

    Raises:
        TargetError: as `load_target` would.
    """
    target = TargetText.parse(text)
    if target.place.startswith("hf:"):
        return
    if target.place.startswith("onnx:"):
        file = Path(target.place.removeprefix("onnx:"))
        if not file.is_file():
            raise TargetError(f"target {target.place}: {'is a folder' if file.is_dir() else 'no such file'}")
        return
    place, _ = _place_and_name(target.place)
    if _is_file(place) and not Path(place).is_file():
        _no_such_file(Path(place))


def _place_and_name(text: str) -> tuple[str, str]:
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise TargetError(
            f"target {text!r} names no function",
            hint=f"add the function that returns the plait.Job: {text.strip(':')}:job",
        )
    return place, name


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place or Path(place).is_file()


def _no_such_file(path: Path) -> NoReturn:
    near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
    what = "is a folder" if path.is_dir() else "no such file"
    raise TargetError(f"target {path}: {what}{nearest(path.name, near)}", hint="the path is relative to here")


@contextmanager
def _same_draws() -> Iterator[None]:
    """The processes of a run load the target each for itself, and have to hold the same sample batch; states are put back."""
    import numpy as np
    import torch

    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  what the user's code may draw from
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  what the user's code may draw from
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002  what the user's code may draw from


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _load_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        _no_such_file(path)
    resolved = path.resolve()
    # The file's own name, as a sibling or a pickle would ask for it, unless something else has it already.
    name = resolved.stem
    loaded = sys.modules.get(name)
    if getattr(loaded, "__file__", None) == str(resolved):
        return typing.cast(types.ModuleType, loaded)
    if loaded is not None or name in sys.stdlib_module_names:
        name = f"plait_target_{name}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise TargetError(f"target {path}: not a Python file", hint="give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:
        del sys.modules[name]
        _raised(problem, str(path), str(resolved))
    return module


def _load_module(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name and (name == problem.name or name.startswith(f"{problem.name}.")):
            raise TargetError(
                f"target {name}: no module named {problem.name!r}",
                hint="use a path such as examples/gpt.py:job, or run where the package can be imported",
            ) from None
        _raised(problem, name, None)
    except (Exception, SystemExit) as problem:
        _raised(problem, name, None)


def _function(module: types.ModuleType, name: str, place: str) -> Callable[..., Any]:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if value is None:
        own = [
            n
            for n, v in vars(module).items()
            if inspect.isfunction(v) and v.__module__ == module.__name__ and n[0] != "_"
        ]
        raise TargetError(
            f"target {place}: it has no function {name!r}{nearest(name, own)}",
            hint=f"its functions are {', '.join(own)}" if own else "",
        )
    if not callable(value):
        raise TargetError(
            f"target {place}:{name} is a {type(value).__name__}, not a function",
            hint="let it be a function that returns the plait.Job",
        )
    return typing.cast(Callable[..., Any], value)


def _bind(function: Callable[..., Any], given: dict[str, str], where: str) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # an annotation that cannot be resolved is as good as none
        hints = {}
    arguments = {}
    for name, text in given.items():
        if name not in named and not takes_any:
            known = f"its arguments are {', '.join(named)}" if named else "it takes no arguments"
            raise TargetError(f"{where}: no argument {name!r}{nearest(name, named)}", hint=known)
        kind = _kind(named.get(name), hints.get(name))
        arguments[name] = kind(text) if kind is Path else convert(text, kind, f"{where}: {name}")
    missing = [n for n, p in named.items() if p.default is p.empty and n not in given]
    if missing:
        raise TargetError(f"{where}: argument {missing[0]!r} is missing", hint=f"add ?{missing[0]}=VALUE to the target")
    return arguments


def _kind(parameter: inspect.Parameter | None, hint: Any) -> type:
    """The type to convert to: the annotation's, else the default value's, else str."""
    known = (bool, int, float, str, list, tuple, Path)
    options = [typing.get_origin(o) or o for o in (*typing.get_args(hint), hint)]
    for kind in options:
        if kind in known:
            return typing.cast(type, kind)
    if parameter is not None and type(parameter.default) in known:
        return type(parameter.default)
    return str


def _raised(problem: BaseException, where: str, file: str | None) -> NoReturn:
    """Raise a TargetError that shows the user's own line."""
    if isinstance(problem, SyntaxError):
        place = f"{problem.filename}, line {problem.lineno}"
        line = (problem.text or "").strip()
    else:
        frames = traceback.extract_tb(problem.__traceback__)
        own = [f for f in frames if file and f.filename == file] or [
            f for f in frames if not f.filename.startswith("<") and Path(__file__) != Path(f.filename)
        ]
        place = f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}" if own else ""
        line = (own[-1].line or "").strip() if own else ""
    message = (str(problem).strip().splitlines() or [""])[0] if not isinstance(problem, SyntaxError) else problem.msg
    hint = ""
    if isinstance(problem, ModuleNotFoundError) and problem.name:
        hint = f"install {problem.name} beside plait, or correct the import"
    raise TargetError(
        f"target {where} raised {type(problem).__name__}: {message}\n\n  {place}\n    {line}", hint=hint
    ) from problem
