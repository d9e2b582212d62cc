"""What works on this machine: figures, collectives, and defects of torch that would make a run silently wrong.

Everything is tried, nothing is looked up: a torch that has a defect repaired passes whatever its version says.
Each check has its own time limit; none can hang the doctor.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait.run.doctor_pair import CHECKS
from plait.units import format_bytes

__all__ = ["examine"]

_PAIR_TIMEOUT = 120.0  # seconds; two processes importing torch on a busy laptop take about 20
_TESTED_TORCH = "2.13"

_OPTIONAL = {
    "transformers": "hf: targets (pip install 'plait[hf]')",
    "tensorboard": "TensorBoard logs (pip install 'plait[log]')",
    "scikit-learn": "the digits examples (pip install 'plait[examples]')",
}


class WrongError(Exception):
    """A check gave something else than it should."""


class AbsentError(Exception):
    """What a check is about is not on this machine, which is no fault."""


class DoubtfulError(Exception):
    """It works, but not as it should."""


def examine() -> dict[str, Any]:
    """`ok` (nothing is broken), `checks` (each with group, name, state and detail) and `versions`.

    A state is ok, absent (not on this machine, and not needed), warning or broken.
    """
    checks: list[dict[str, str]] = []
    for group, name, check in _CHECKS:
        checks.append(_try(group, name, check))
    checks += _pair("collectives (gloo)", "cpu", 2)
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        kind = device.type if device is not None else "cuda"
        checks += _pair(f"collectives ({kind})", kind, min(2, torch.accelerator.device_count()))
    last = ["known defects", "packages"]
    order = [group for group in dict.fromkeys(c["group"] for c in checks) if group not in last] + last
    checks.sort(key=lambda c: order.index(c["group"]))
    return {
        "ok": all(check["state"] != "broken" for check in checks),
        "checks": checks,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "plait": _version("plait") or ""},
    }


def _try(group: str, name: str, check: Callable[[], str]) -> dict[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table is the place for what is wrong
            state, detail = "ok", check()
    except AbsentError as fact:
        state, detail = "absent", str(fact)
    except DoubtfulError as fact:
        state, detail = "warning", str(fact)
    except Exception as problem:
        lines = str(problem).strip().splitlines()
        state, detail = "broken", f"{type(problem).__name__}: {lines[0] if lines else ''}".removeprefix("WrongError: ")
    return {"group": group, "name": name, "state": state, "detail": detail}


# The machine


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _threads() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{cores} cores, torch uses {torch.get_num_threads()} threads a process"


def _memory() -> str:
    total, free = _memory_bytes()
    if free < 2 * 2**30:
        raise DoubtfulError(
            f"{format_bytes(free)} free of {format_bytes(total)}: a process needs about 0.5 GiB for torch alone"
        )
    return f"{format_bytes(free)} free of {format_bytes(total)}"


def _memory_bytes() -> tuple[int, int]:
    """(total, available) bytes of memory, within the limit of a container where there is one."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        cap = int(limit.read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, cap), min(free, max(0, cap - used))
    return total, free


def _disk() -> str:
    usage = shutil.disk_usage(Path.cwd())
    if usage.free < 2**30:
        raise DoubtfulError(f"{format_bytes(usage.free)} free in the working folder: checkpoints may not fit")
    return f"{format_bytes(usage.free)} free in the working folder"


def _loopback() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    return "a free port can be listened on and reached"


# torch


def _torch_version() -> str:
    if not torch.__version__.startswith(f"{_TESTED_TORCH}."):
        raise DoubtfulError(
            f"{torch.__version__}; plait is proved on {_TESTED_TORCH}, run `plait verify` before you trust it"
        )
    return torch.__version__


def _accelerator() -> str:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        raise AbsentError("none: runs on the CPU")
    count = torch.accelerator.device_count()
    backend = torch.distributed.get_default_backend_for_device(device)
    name, memory = "", ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory = f" ({properties.name})", f", {format_bytes(properties.total_memory)} each"
    return f"{count} x {device.type}{name}{memory}, collectives by {backend}"


def _backends() -> str:
    import torch.distributed as dist

    if not dist.is_available():
        raise WrongError("this torch was built without torch.distributed")
    known = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "xccl": dist.is_xccl_available(),
        "ucc": dist.is_ucc_available(),
        "mpi": dist.is_mpi_available(),
    }
    if not known["gloo"]:
        raise WrongError("gloo is missing, which --devices N on a CPU needs")
    return ", ".join(name for name, there in known.items() if there)


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.relu(self.first(x)))
        return result


def _export() -> str:
    model, x = _Small(), torch.randn(6, 4)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
    other = torch.randn(3, 4)
    captured = exported.module()(other)
    _same(captured, model(other), "the captured graph's output at another batch size")
    captured.sum().backward()
    return "captures, keeps the batch open, differentiates"


def _safetensors() -> str:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="plait-doctor-") as folder:
        file = Path(folder, "x.safetensors")
        x = torch.randn(3, 3)
        save_file({"x": x}, file)
        _same(load_file(file)["x"], x, "a tensor read back")
    return f"writes and reads, {_version('safetensors')}"


def _checkpoint() -> str:
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    with tempfile.TemporaryDirectory(prefix="plait-doctor-") as folder:
        x = torch.randn(5)
        loaded = {"x": torch.zeros(5)}
        save({"x": x}, checkpoint_id=folder, no_dist=True)
        load(loaded, checkpoint_id=folder, no_dist=True)
        _same(loaded["x"], x, "a tensor read back")
    return "DCP writes and reads"


def _schedules() -> str:
    from torch.distributed.pipelining import schedules

    names = ("ScheduleGPipe", "Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble")
    missing = [name for name in names if not hasattr(schedules, name)]
    if missing:
        raise WrongError(f"torch.distributed.pipelining lacks {', '.join(missing)}")
    return "gpipe, 1f1b, interleaved, zerobubble"


# Known defects: what zero-bubble schedules call, on modules where other versions were wrong.


class _Reused(nn.Module):
    """One weight twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight) @ self.weight


class _TwoOutputs(torch.autograd.Function):
    """x w and 3 x w, from one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        return x @ weight, 3 * (x @ weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        both = gradients[0] + 3 * gradients[1]
        return both @ weight.T, x.T @ both


class _Several(nn.Module):
    """A node where input and weight meet has two outputs, which are used differently."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, three = _TwoOutputs.apply(x, self.weight)  # type: ignore[no-untyped-call]
        result: torch.Tensor = torch.tanh(one) * three
        return result


def _split_backward(model: nn.Module) -> None:
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    x = torch.randn(4, 3, requires_grad=True)
    weights = list(model.parameters())
    expected_x, *expected = torch.autograd.grad(model(x).sum(), [x, *weights])
    gradients, groups = stage_backward_input([model(x).sum()], None, [x], iter(weights))
    stage_backward_weight(iter(weights), groups)
    _same(gradients[0], expected_x, "the gradient of the input")
    for weight, gradient in zip(weights, expected, strict=True):
        _same(weight.grad, gradient, "the gradient of the weight")


def _zero_bubble_reuse() -> str:
    torch.manual_seed(0)
    _split_backward(_Reused())
    return "a weight used twice gets its gradient once (pytorch#180952)"


def _zero_bubble_several() -> str:
    torch.manual_seed(0)
    _split_backward(_Several())
    return "each of several outputs gets its own gradient (pytorch#170277)"


def _same(found: torch.Tensor | None, expected: torch.Tensor, what: str) -> None:
    if found is None or not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
        off = "missing" if found is None else f"off by {(found - expected).abs().max().item():.2g}"
        raise WrongError(f"{what} is {off}")


# Packages


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, purpose: str) -> Callable[[], str]:
    def check() -> str:
        version = _version(name)
        if version is None:
            raise AbsentError(f"for {purpose}")
        return version

    return check


_CHECKS: list[tuple[str, str, Callable[[], str]]] = [
    ("machine", "Python", _python),
    ("machine", "cores", _threads),
    ("machine", "memory", _memory),
    ("machine", "disk", _disk),
    ("machine", "loopback", _loopback),
    ("torch", "version", _torch_version),
    ("torch", "accelerator", _accelerator),
    ("torch", "backends", _backends),
    ("torch", "export", _export),
    ("torch", "schedules", _schedules),
    ("torch", "safetensors", _safetensors),
    ("torch", "checkpoints", _checkpoint),
    ("known defects", "zero-bubble, reused weight", _zero_bubble_reuse),
    ("known defects", "zero-bubble, several outputs", _zero_bubble_several),
    *(("packages", name, _package(name, purpose)) for name, purpose in _OPTIONAL.items()),
]


def _pair(group: str, device: str, count: int) -> list[dict[str, str]]:
    """The checks of `doctor_pair` on `count` processes; one broken check where they don't come back."""
    with tempfile.TemporaryDirectory(prefix="plait-doctor-") as folder:
        processes = [_start(rank, count, device, Path(folder)) for rank in range(count)]
        problem = ""
        try:
            for process in processes:
                process.wait(timeout=_PAIR_TIMEOUT)
        except subprocess.TimeoutExpired:
            problem = f"no answer from {count} processes within {_PAIR_TIMEOUT:.0f} s"
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        answer = Path(folder, "answer.json")
        found: list[dict[str, str]] = json.loads(answer.read_text()) if answer.exists() else []
        # What happens to the others after the last answer is of no interest: one leaves before the other.
        if not problem and len(found) < len(CHECKS):
            lines = Path(folder, "errors.txt").read_text(errors="replace").strip().splitlines()
            problem = lines[-1] if lines else f"exit status {[p.returncode for p in processes]}"
    checks = [{**check, "group": check["group"] or group} for check in found]
    if problem:
        checks.append({"group": group, "name": f"{count} processes", "state": "broken", "detail": problem})
    return checks


def _start(rank: int, count: int, device: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "plait.run.doctor_pair", str(rank), str(count), device, str(folder)]
    with Path(folder, "errors.txt").open("ab") as errors:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
