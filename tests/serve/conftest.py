"""A package of test backends, registered as anybody's would be: by entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests import `small_models` by this name

BACKENDS = '''
import os
import time
from pathlib import Path

from plait.serve.backend import Backend


class Program(Backend):
    """Runs the exported program; the others differ from it in one thing."""

    name = "program"

    def export(self, subject, folder, precision):
        import torch

        for name in subject.entries:
            torch.export.save(subject.program(name), folder / f"{name}.pt2")
        return {}

    def load(self, artefact):
        import torch

        module = torch.export.load(artefact.folder / f"{artefact.entry.name}.pt2").module(check_guards=False)
        return lambda inputs: module(*inputs)


class Aborts(Program):
    name = "aborts"

    def export(self, subject, folder, precision):
        (folder / "half").write_bytes(b"0" * 1000)
        os.abort()


class Sleeps(Program):
    name = "sleeps"

    def load(self, artefact):
        time.sleep(100)


class Full(Program):
    name = "full"

    def export(self, subject, folder, precision):
        (folder / "half").write_bytes(b"0" * 1000)
        raise OSError(28, "No space left on device")


class Wrong(Program):
    name = "wrong"

    def load(self, artefact):
        run = super().load(artefact)
        return lambda inputs: [value * 1.001 for value in run(inputs)]


class Forgets(Program):
    """Drops what is zero in fresh weights: parity on them would hold."""

    name = "forgets"

    def export(self, subject, folder, precision):
        import torch

        program = subject.program()
        for name, value in program.state_dict.items():
            if name.endswith("bias"):
                value.data.zero_()
        torch.export.save(program, folder / "forward.pt2")
        return {}


class Refuses(Program):
    name = "refuses"

    def export(self, subject, folder, precision):
        raise RuntimeError("no conversion for aten::gelu")


class Static(Program):
    """Takes programs of one length alone."""

    name = "static"

    def export(self, subject, folder, precision):
        sizes = [s for n in subject.program().graph.nodes if n.op == "placeholder" for s in n.meta["val"].shape[1:2]]
        if any(not isinstance(size, int) for size in sizes):
            raise RuntimeError("a length has to be a number")
        return super().export(subject, folder, precision)


class Absent(Program):
    name = "absent"
    extra = "absent"
    imports = ("a_package_that_is_not_there",)
'''
NAMES = ("Program", "Aborts", "Sleeps", "Full", "Wrong", "Forgets", "Refuses", "Static", "Absent")


@pytest.fixture
def more_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs the test backends for one test."""
    folder = tmp_path / "site"
    about = folder / "more_backends-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "more_backends.py").write_text(BACKENDS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: more-backends\nVersion: 1.0\n")
    lines = [f"{name.lower()} = more_backends:{name}" for name in NAMES]
    (about / "entry_points.txt").write_text("[plait.backends]\n" + "\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("more_backends", None)
