"""What an engine is given, and what it gives back."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plait.hardware.catalogue import Accelerator
from plait.schema import Plan

__all__ = ["Engine", "File", "Job", "Request", "Submit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A target under a plan on nodes of equal size; checked by `plait.jobs.placement` before an engine sees it."""

    target: str
    plan: Plan
    nodes: int
    devices_per_node: int
    name: str
    """Of the job: small letters, digits and dashes, as Kubernetes wants it."""
    folder: str
    """Where the files go, relative to `root` with forward slashes where it lies within."""
    root: Path
    """The working directory: what TARGET is relative to, and what engines send along."""
    part: Accelerator | None = None
    """None: no accelerator is asked for."""
    cpu_only: bool = False
    """Whether the CPU was asked for, also where torch finds an accelerator."""
    threads: int = 0
    """Of a process on the CPU, as measured on a computer with `measured_cores`; 0: not measured."""
    measured_cores: int = 0
    measured: str = ""
    """Whose measurement, for people."""
    train: tuple[str, ...] = ()
    """More words of `plait train`, such as --steps 100."""
    run_dir: str = ""
    """Empty: the engine's usual place."""
    image: str = ""
    spot: bool = False
    interface: str = ""
    """Network interface between nodes; empty: the one of the default route."""
    hosts: tuple[str, ...] = ()
    restarts: int = 3

    @property
    def device(self) -> str:
        """torch's word for the devices."""
        return "cpu" if self.part is None else self.part.device.torch_device or "unknown"

    @property
    def cores(self) -> int:
        """Cores that a node's processes use on a CPU: one for each thread."""
        return self.devices_per_node * max(1, self.threads)

    @property
    def part_name(self) -> str:
        """What a person calls the devices."""
        if self.part is not None:
            return self.part.name
        return "processes on the CPU" if self.cpu_only else "devices"

    def train_text(self, *, plan: str, run_dir: str) -> str:
        """`plait train`'s words for a shell; `plan` and `run_dir` may hold shell variables and stand in double quotes.

        --resume always: a restarted job goes on, a first one starts.
        """
        quoted = " ".join(shlex.quote(word) for word in self.train)
        middle = f" {quoted}" if quoted else ""
        return f'train {shlex.quote(self.target)} --plan "{plan}"{middle} --run-dir "{run_dir}" --resume'


@dataclass(frozen=True, slots=True)
class File:
    """One file of a job."""

    path: str
    """Within the job's folder."""
    text: str
    executable: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Submit:
    """The engine's own command that starts a job."""

    words: tuple[str, ...]
    """Run in the request's root."""
    install: str
    """What to do where the command is not there."""
    module: str = ""
    """A Python module that it needs beside."""
    program: str = ""
    """What the script that `words` start needs; empty: the first word itself."""
    variables: tuple[str, ...] = ()
    """Of the environment, without which it cannot start."""

    @property
    def text(self) -> str:
        """The command as it is typed."""
        return shlex.join(self.words)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What an engine wrote."""

    files: tuple[File, ...]
    """The first is the one to read first."""
    submit: Submit
    notes: tuple[str, ...] = ()
    """What a person must still fill in, and what the engine cannot do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """The one interface of all engines."""

    name: str
    says: str
    write: Callable[[Request], Job]
    aliases: tuple[str, ...] = ()
    sends_project: bool = False
    """Whether nodes get a copy of the working directory (or an image with it), so that TARGET must lie within."""
    sends_files: bool = False
    """Whether they get the job's own files with it, so that these must lie within, too."""
    takes_spot: bool = False
    """Whether the files can ask for capacity that may be taken back."""
