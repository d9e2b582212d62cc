"""What a serving runtime is to plait. One small file each; found by the entry points of the group `plait.backends`.

    parent process                              child process, one for each backend (crashes and time limits stay there)
    model ─torch.export─▶ Subject (a folder) ─▶ missing()? refusal()? ─▶ export() ─▶ load() ─▶ runner: checked, timed
                                                        artefact folder ─▶ renamed to its final name, with manifest.json

To add a runtime, derive from `Backend`, and name the class in your package's metadata:

    [project.entry-points."plait.backends"]
    myruntime = "my_package.plait_backend:MyRuntime"

A child may run in another interpreter (`Backend.interpreter`): with torch 2.13, numpy and safetensors beside the runtime,
without plait's other dependencies. So a backend's file imports, at its top, nothing but the standard library, torch-free
files of `plait.serve` and `plait.errors`; the runtime and torch are imported inside its methods.

A subject's folder (written by `plait.serve.subject`, read by `Subject.read`):

    subject.json                       everything below, and names, shapes, limits, weights
    forward.pt2                        one exported program for each entry point (torch.export.save): positional tensors in,
                                       a tuple of tensors out, the training-level graph, eval mode, the user's lines in
                                       each node's `stack_trace`
    forward-0.safetensors              samples at several sizes: `in.<input>`, `out.<output>` (of the user's own module in
                                       eager), and where weights are random `perturbed.<output>`
    forward-data-0.safetensors         batches of the user's data, in the same form
"""

from __future__ import annotations

import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch

    from plait.serve.subject import Entry, Subject

__all__ = ["PRECISIONS", "Artefact", "Backend", "Runner"]

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int8-weight")
"""`int8` quantises weights and, while running, activations; `int8-weight` the weights alone."""

Runner = Callable[[Sequence["torch.Tensor"]], Sequence["torch.Tensor"]]
"""The inputs in the order of `Entry.inputs` to the outputs in the order of `Entry.outputs`, on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefact:
    """What `Backend.load` is given: a folder that `export` wrote, here or long ago."""

    folder: Path
    entry: Entry
    """The entry point to load."""
    precision: str
    threads: int
    """Threads that the runtime may use."""
    facts: Mapping[str, Any]
    """What `export` returned, as it came back from JSON. From a file: check before use."""
    subject: Subject | None = None
    """Only in the process that exported; an artefact that is kept has to load without it."""
    knobs: Mapping[str, Any] | None = None
    """Settings of the runtime that a tuner tries, by the names in `Backend.knobs`."""


class Backend(ABC):
    """A serving runtime. Made without arguments; says what it can before anything heavy is imported."""

    name: ClassVar[str]
    """What stands after --to."""
    extra: ClassVar[str] = ""
    """plait's extra that installs it; empty where torch is enough."""
    imports: ClassVar[tuple[str, ...]] = ()
    """Top-level modules that must be installed."""
    distributions: ClassVar[tuple[str, ...]] = ()
    """Packages whose versions go into the manifest."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    status: ClassVar[Literal["run", "prepared"]] = "run"
    """`prepared`: files are written and checked, but nothing runs here (`load` is never called)."""
    keeps: ClassVar[bool] = True
    """False: a row for comparison, which leaves no artefact."""
    quantised_weights: ClassVar[bool] = True
    """Whether an int8 artefact is expected to be smaller than the parameters in fp32."""
    openmp: ClassVar[bool] = False
    """Whether its threads are OpenMP's, so that OpenMP's own variables change how it runs."""
    variant: str = ""
    """Which of `variants` to export; empty: none of them. Set before `export`."""

    def interpreter(self) -> str:
        """The Python that the child runs in; this one unless the runtime has an environment of its own.

        Raises:
            plait.errors.ServeError: that environment is not there; the hint is the command that makes it.
        """
        return sys.executable

    def missing(self) -> str:
        """What is not installed and how to get it, in one line; empty where all is there. Imports nothing."""
        absent = [name for name in self.imports if importlib.util.find_spec(name) is None]
        if not absent:
            return ""
        how = f"pip install 'plait[{self.extra}]'" if self.extra else f"pip install {' '.join(absent)}"
        return f"{', '.join(absent)} not installed: {how}"

    def refusal(self, subject: Subject, precision: str) -> str:
        """Why this model, precision or platform is refused, in one line; empty where it may be tried."""
        if precision not in self.precisions:
            return f"{self.name} has no {precision} here; it has {', '.join(self.precisions)}"
        return ""

    def part(self, subject: Subject) -> Subject:
        """The subject with the entry points that this backend has a use for; all of them unless it says otherwise."""
        return subject

    def versions(self) -> dict[str, str]:
        """Package -> version, for the manifest."""
        found = {}
        for package in ("torch", *self.distributions):
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return found

    def knobs(self) -> Mapping[str, Sequence[Any]]:
        """Settings of `load` that a tuner may try, each with its values, the default first."""
        return {}

    def variants(self, precision: str) -> Sequence[str]:
        """Other ways to make the same artefact (settings of a compiler), which a tuner has made and tries beside it.

        Names for folders, in the order of what promises most. `export` finds the one that it is to make in `self.variant`.
        """
        return ()

    @abstractmethod
    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """Write every entry point of the subject into `folder`, which exists and is empty; gives JSON facts for `load`.

        Any exception is reported as this backend's failure; the operator is looked for in its text. A fact `note`
        (a text, one line) is shown beside the row; `serves`, a mapping from a dimension's name to (least, most), says
        that the artefact takes less than the subject's own limits.
        """

    @abstractmethod
    def load(self, artefact: Artefact) -> Runner:
        """A function that runs one entry point. It may be called with any sizes that the manifest allows."""
