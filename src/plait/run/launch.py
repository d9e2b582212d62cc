"""From a command's words to processes: what the verbs `train` and `verify` call.

Under torchrun (or any launcher that sets RANK and WORLD_SIZE) this process is one of them; otherwise plait starts
`--devices` processes itself. The parent imports no torch.
"""

from __future__ import annotations

import datetime
import json as json_module
import os
from pathlib import Path
from typing import Any

from plait.capture.target import check_target
from plait.errors import PlanError
from plait.plan.space import refuse_unsupported
from plait.run.processes import settle_under_launcher, spawn
from plait.schema import Estimate, Plan

__all__ = ["run_train", "run_verify", "run_verify_forward", "under_launcher"]


def under_launcher() -> int | None:
    """The number of processes that a launcher such as torchrun started; None when there is none."""
    size = os.environ.get("WORLD_SIZE")
    return int(size) if size and "RANK" in os.environ else None


def bound_plan(plan: str, devices: int | None) -> Plan:
    """The plan, checked against the devices that are there or were asked for.

    Raises:
        PlanError: malformed, or the degrees do not multiply to the devices.
    """
    loaded = Plan.load(plan)
    refuse_unsupported(loaded)
    size = under_launcher()
    if size is not None and devices is not None and size != devices:
        raise PlanError(f"plan: --devices {devices}, but the launcher started {size} processes")
    return loaded.bound(devices=size or devices)


def in_processes(function: Any, arguments: tuple[Any, ...], devices: int) -> Any:
    """The first process's result of `function(*arguments)`; None in the others of a launcher."""
    if under_launcher() is not None:
        settle_under_launcher()
        result = function(*arguments)
        return result if os.environ["RANK"] == "0" else None
    return spawn(function, devices=devices, args=arguments)[0]


def run_verify(
    *,
    target: str,
    devices: int | None,
    plan: str,
    steps: int = 3,
    batch: int | None = None,
    seed: int = 0,
    certificate: Path | None = None,
) -> dict[str, Any] | None:
    """`plait verify`: the verdict as plain values, with the path of the certificate written."""
    check_target(target)
    bound = bound_plan(plan, devices)
    result = in_processes(_verify_here, (target, bound, steps, batch, seed), bound.devices)
    if result is None:
        return None
    path = certificate or Path("runs") / "certificates" / f"{_slug(target)}-{_slug(bound.spec())}.json"
    result["certificate"] = str(path)
    _write_certificate(path, target, bound, result)
    return dict(result)


def run_verify_forward(
    *,
    target: str,
    devices: int | None,
    plan: str,
    batch: int | None = None,
    seed: int = 0,
    weights: Path | None = None,
) -> dict[str, Any] | None:
    """`plait verify --forward`: the verdict as plain values."""
    check_target(target)
    bound = bound_plan(plan, devices)
    place = None if weights is None else str(weights)
    result = in_processes(_verify_forward_here, (target, bound, batch, seed, place), bound.devices)
    return None if result is None else dict(result)


def run_train(
    *,
    target: str,
    devices: int | None,
    plan: str = "auto",
    data: Path | None = None,
    run_dir: Path | None = None,
    json: bool = False,
    **options: Any,
) -> dict[str, Any] | None:
    """`plait train`: a summary as plain values, by the first process."""
    check_target(target)
    chosen = _chosen(target, devices, options.get("batch")) if plan == "auto" else None
    bound = bound_plan(plan, devices) if chosen is None else chosen.plan
    folder = run_dir or Path("runs") / f"{_slug(target)}-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}"
    result = in_processes(
        _train_here,
        (target, bound, folder, data, {**options, "quiet": json, "measure": chosen is not None}),
        bound.devices,
    )
    if result is None:
        return None
    if chosen is not None:
        from plait.hardware.calibrate import CLUSTER_FILE
        from plait.hardware.local import local_cluster
        from plait.run.choose import side_by_side

        result["prediction"] = side_by_side(chosen, result["measured"])
        (folder / "prediction.json").write_text(json_module.dumps(result["prediction"], indent=1), encoding="utf-8")
        # What the prediction was made for: `plait hardware probe --calibrate` corrects this cluster.
        (folder / CLUSTER_FILE).write_text(local_cluster(chosen.plan.devices).to_json(), encoding="utf-8")
    _write_summary(folder, result, chosen)
    return dict(result)


def _chosen(target: str, devices: int | None, batch: int | None) -> Estimate:
    """The searched plan for this computer's processes (one if neither --devices nor a launcher says)."""
    size = under_launcher() or devices or 1
    from plait.run.choose import choose, choose_in_process

    # Under a launcher every process searches for itself: the same graph, probe and search, so the same plan.
    return choose_in_process(target, size, batch) if under_launcher() else choose(target, size, batch)


def _train_here(target: str, plan: Plan, folder: Path, data: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    from plait.capture.target import load_target
    from plait.run.train import TrainOptions, train

    job = load_target(target)
    if os.environ.get("RANK", "0") == "0":
        _write_what_runs(folder, target, plan)
    text = getattr(job, "text", None)
    if text is not None and job.data is None:
        from plait.run.data import text_samples

        job.data = text_samples(text, data)
    elif data is not None:
        raise PlanError(f"train: --data {data} is for hf: targets that read text; this target brings its own data")
    return train(job, plan, TrainOptions(run_dir=folder, **options))


def _write_what_runs(folder: Path, target: str, plan: Plan) -> None:
    """Note in the run directory what is trained there, for `plait export`, `plait report` and whoever finds it later."""
    import platform
    from importlib.metadata import version

    record = {
        "target": target,
        "cwd": str(Path.cwd()),
        "plan": plan.to_dict(),
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"host": platform.node(), "system": platform.platform(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("plait", "torch")}},
    }
    _write_json(folder / "run.json", record)


def _write_summary(folder: Path, result: dict[str, Any], chosen: Estimate | None) -> None:
    """What came of the run, for `plait report`: the result without the losses, which the log has, and the prediction."""
    summary = {k: v for k, v in result.items() if k not in ("losses", "sample", "prediction")}
    _write_json(folder / "summary.json", {**summary, "estimate": None if chosen is None else chosen.to_dict()})


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(json_module.dumps(record), encoding="utf-8")
    aside.replace(path)


def _verify_here(target: str, plan: Plan, steps: int, batch: int | None, seed: int) -> dict[str, Any]:
    from plait.capture.target import load_target
    from plait.run.verify import verify

    return verify(load_target(target), plan, steps=steps, batch=batch, seed=seed).to_dict()


def _verify_forward_here(target: str, plan: Plan, batch: int | None, seed: int, weights: str | None) -> dict[str, Any]:
    from plait.capture.target import load_target
    from plait.run.verify_forward import verify_forward

    return verify_forward(load_target(target), plan, batch=batch, seed=seed, weights=weights).to_dict()


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "=-" else "_" for c in text.rsplit("/", 1)[-1])


def _write_certificate(path: Path, target: str, plan: Plan, result: dict[str, Any]) -> None:
    from importlib.metadata import version

    record = {
        "model": target,
        "plan": plan.to_dict(),
        "versions": {name: version(name) for name in ("plait", "torch")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **{k: v for k, v in result.items() if k not in ("plan", "certificate")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json_module.dumps(record, indent=1), encoding="utf-8")
    aside.replace(path)
