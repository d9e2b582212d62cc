"""`launch`: a target and a plan -> the files of a job on an engine, and, only when asked, its start."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import PlanError, RequestError
from plait.hardware.builds import build_for
from plait.hardware.catalogue import Accelerator, find
from plait.hardware.placement import thread_curve, threads_for
from plait.hardware.probe import load_probe
from plait.jobs.engines import engine_called
from plait.jobs.placement import check_placement, shape_of
from plait.jobs.plan_file import made_for
from plait.jobs.request import Engine, Job, Request
from plait.jobs.start import start
from plait.jobs.target import check_target_exists, relative_target
from plait.plan.space import unsupported
from plait.schema import Plan

__all__ = ["LaunchOptions", "launch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchOptions:
    """What `plait launch` takes beside target, plan and engine."""

    nodes: int | None = None
    devices_per_node: int | None = None
    gpu_type: str | None = None
    output: Path | None = None
    submit: bool = False
    force: bool = False
    """Write over files that were changed."""
    tp_across_nodes: bool = False
    name: str | None = None
    image: str = ""
    spot: bool = False
    interface: str = ""
    hosts: tuple[str, ...] = ()
    restarts: int = 3
    run_dir: str = ""
    steps: int | None = None
    batch: int | None = None
    seed: int | None = None
    data: str | None = None
    checkpoint_minutes: float = 10
    """So much work is lost at most when a node goes; `plait train` alone checkpoints at the end only."""


def launch(target: str, plan: str | Plan, to: str, options: LaunchOptions | None = None) -> dict[str, Any]:
    """Write the job's files and say what they are; start it only with `options.submit`.

    Raises:
        RequestError: engine, target, plan, accelerator or sizes that do not fit; says what to change.
        PlaitError: the engine's own command refused the job.
    """
    options = options or LaunchOptions()
    engine = engine_called(to)
    loaded = Plan.load(plan)
    check_target_exists(target)
    if reasons := unsupported(loaded):
        raise PlanError(
            f"launch: plait cannot run this plan: {reasons[0]}",
            hint="`plait plan --runnable` and `plait advise` leave such plans out",
        )
    origin = made_for(plan)
    wanted = options.gpu_type or origin.part or None
    request = _request(target, loaded, engine, options, _part(wanted), is_cpu=_is_cpu(wanted))
    axes = check_placement(loaded, request.devices_per_node, tp_may_cross=options.tp_across_nodes)
    job = engine.write(request)
    folder = request.root / request.folder
    _write(folder, job, force=options.force)
    notes = [*job.notes]
    if request.part is None and not request.cpu_only and engine.name != "torchrun":
        notes.append("no --gpu-type was given: the job asks for no accelerator")
    if options.spot and not engine.takes_spot:
        notes.append(f"--spot changes nothing here: what {engine.name} takes nodes from is the cluster's own to decide")
    notes += origin.notes(target, None if request.part is None else request.part.name, is_cpu=request.cpu_only)
    if request.part is not None and (build := build_for(request.part)) is not None:
        notes.append(f"{build.says}: install that torch on the nodes ({build.source})")
    if options.tp_across_nodes and any(axis.axis == "tp" and not axis.is_inside for axis in axes):
        notes.append("tp crosses nodes, as asked: expect it to wait for the network in every layer")
    result: dict[str, Any] = {
        "engine": engine.name,
        "name": request.name,
        "target": request.target,
        "plan": loaded.spec(),
        "nodes": request.nodes,
        "devices_per_node": request.devices_per_node,
        "accelerator": None if request.part is None else request.part.name,
        "placement": [{**axis.to_dict(), "inside_node": axis.is_inside} for axis in axes],
        "folder": request.folder,
        "files": [f"{request.folder}/{file.path}" for file in job.files],
        "submit": list(job.submit.words),
        "submitted": False,
        "notes": notes,
    }
    if options.submit:
        start(engine, job.submit, request)
        result["submitted"] = True
    return result


def _request(
    target: str, plan: Plan, engine: Engine, options: LaunchOptions, part: Accelerator | None, *, is_cpu: bool
) -> Request:
    root = Path.cwd()
    if options.batch is not None:
        plan.bound(batch=options.batch)
    nodes, per_node = shape_of(plan, options.nodes, options.devices_per_node)
    if options.hosts and len(options.hosts) != nodes:
        raise RequestError(f"launch: --hosts names {len(options.hosts)} hosts, the job has {nodes} nodes")
    name = _job_name(options.name or _name_of(target))
    folder = _folder(options.output or Path("launch") / f"{name}-{engine.name}", root, engine)
    _check_words(options, target, folder)
    is_cpu = is_cpu or (part is not None and part.device.torch_device == "cpu")
    probe = load_probe() if is_cpu else None
    if probe is not None and not probe.has("copy/threads=1"):
        probe = None  # of a version that measured other things
    return Request(
        target=relative_target(target, root, must_lie_within=engine.sends_project and not options.image),
        plan=plan,
        nodes=nodes,
        devices_per_node=per_node,
        name=name,
        folder=folder,
        root=root,
        part=None if is_cpu else part,
        cpu_only=is_cpu,
        threads=0 if probe is None else threads_for(thread_curve(probe), probe.cores // per_node),
        measured_cores=0 if probe is None else probe.cores,
        measured="" if probe is None else f"{probe.host}, {probe.processor}, {probe.cores} cores, {probe.date}",
        train=_train_words(options),
        run_dir=re.sub(r"^~(?=/|$)", "$HOME", options.run_dir),  # no shell expands it within quotes
        image=options.image,
        spot=options.spot,
        interface=options.interface,
        hosts=options.hosts,
        restarts=options.restarts,
    )


_SAFE = {
    # What goes into scripts unquoted may hold only what such names hold, and does not begin like an option.
    "--interface": r"([A-Za-z0-9_][A-Za-z0-9_.:@-]*)?",
    "--image": r"([A-Za-z0-9_][A-Za-z0-9_.:/@-]*)?",
    "--hosts": r"([A-Za-z0-9_:][A-Za-z0-9_.:@-]*(,(?!-)|$))*",
    "--run-dir": r"([\w./~][\w.:/@=+,~ -]*)?",
    "--output": r"[\w./~][\w.:/@=+,~ -]*",
}


def _check_words(options: LaunchOptions, target: str, folder: str) -> None:
    """Refuse words that would mean something else in a script.

    Raises:
        RequestError: names the option.
    """
    words = {
        "--interface": options.interface,
        "--image": options.image,
        "--hosts": ",".join(options.hosts),
        "--run-dir": options.run_dir,
        "--output": folder,
    }
    for option, word in words.items():
        if not re.fullmatch(_SAFE[option], word):
            raise RequestError(f"launch: {option} {word!r} holds a character that such a name cannot have")
    if not math.isfinite(options.checkpoint_minutes):
        raise RequestError(
            f"launch: --checkpoint-minutes {options.checkpoint_minutes:g} is no time between checkpoints"
        )
    for what, text in (("the target", target), ("--data", options.data or "")):
        if not text.isprintable():
            raise RequestError(f"launch: {what} {text!r} holds a character that cannot be printed")


def _is_cpu(name: str | None) -> bool:
    return name is not None and name.strip().lower() == "cpu"


def _train_words(options: LaunchOptions) -> tuple[str, ...]:
    pairs = (
        ("--steps", options.steps),
        ("--batch", options.batch),
        ("--seed", options.seed),
        ("--data", options.data),
        ("--checkpoint-minutes", f"{options.checkpoint_minutes:g}"),
    )
    return tuple(word for name, value in pairs if value is not None for word in (name, str(value)))


def _part(name: str | None) -> Accelerator | None:
    """The accelerator called `name`; None for processes on the CPU, and where nothing is asked for.

    Raises:
        HardwareError: it is not in the catalogue.
        RequestError: it cannot train, or plait cannot run on it.
    """
    if name is None or _is_cpu(name):
        return None
    part = find(name)
    if not part.device.trains:
        after = f"; {part.successor} is its successor" if part.successor else ""
        raise RequestError(
            f"launch: {part.name} cannot train{after}", hint="`plait hardware list --trains` lists what can"
        )
    if not part.device.torch_device:
        raise RequestError(
            f"launch: no torch device is known for {part.name}, so plait cannot train on it",
            hint="`plait hardware list --trains` lists what can",
        )
    build = build_for(part)
    if build is not None and not build.runs:
        raise RequestError(
            f"launch: {part.name}: {build.says} ({build.source})",
            hint="`plait hardware list --trains` lists other parts",
        )
    return part


def _name_of(target: str) -> str:
    """From examples/gpt.py:job?layers=4 to gpt; the function's name joins where it is not `job`."""
    place = target.partition("?")[0]
    if place.startswith("hf:"):
        return place.removeprefix("hf:").rstrip("/").rpartition("/")[2]
    file, _, function = place.rpartition(":")
    stem = Path(file).stem if file.endswith(".py") or "/" in file else file.rpartition(".")[2]
    return stem if function == "job" else f"{stem}-{function}"


def _job_name(text: str) -> str:
    """A name that every engine takes: a DNS label of at most 40 characters."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    if not name:
        raise RequestError(f"launch: {text!r} makes no name for a job", hint="give one with --name")
    return name if name[0].isalpha() else f"plait-{name}"


def _folder(folder: Path, root: Path, engine: Engine) -> str:
    """Relative to the project where it lies within.

    Raises:
        RequestError: the engine sends the project along, and the folder lies outside.
    """
    whole = (root / folder).resolve()
    if whole.is_relative_to(root.resolve()):
        relative = whole.relative_to(root.resolve()).as_posix()
        if relative != ".":
            return relative
        raise RequestError("launch: the job's files need a folder of their own", hint="pass -o launch/NAME")
    if engine.sends_files:
        raise RequestError(
            f"launch: {engine.name} sends the working directory along, and {folder} lies outside",
            hint="pass -o with a folder inside it",
        )
    return whole.as_posix()


def _write(folder: Path, job: Job, *, force: bool) -> None:
    """Write the files, none of them if one was changed by somebody.

    Raises:
        RequestError: a file is there with another text, or the folder cannot be written.
    """
    try:
        for file in job.files:
            path = folder / file.path
            if not force and path.exists() and path.read_text(encoding="utf-8") != file.text:
                raise RequestError(
                    f"launch: {path} is there already and differs", hint="pass --force to write over it, or another -o"
                )
        folder.mkdir(parents=True, exist_ok=True)
        for file in job.files:
            path = folder / file.path
            path.write_text(file.text, encoding="utf-8", newline="\n")
            if file.executable:
                path.chmod(path.stat().st_mode | 0o111)
    except (OSError, UnicodeDecodeError) as problem:
        why = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise RequestError(
            f"launch: the files cannot be written into {folder}: {why}",
            hint="pass -o with a folder that can be written",
        ) from None
