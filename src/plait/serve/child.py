"""One backend in a process of its own: exported, loaded, checked, timed. Started by `plait.serve.isolate`.

    python -m plait.serve.child REQUEST.json

Reads the request, writes the result file again after every stage, so that a crash leaves what was known before it.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.serve.backend import Artefact, Backend
from plait.serve.subject import Subject

__all__ = ["Request", "main"]


_LACKING = re.compile(
    r"No conversion rule found|Conversion is failed for|No ONNX function found|No decompositions registered|"
    r"no kernel for|Unsupported (?:fx node|operator|node)|not implemented for",
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a child is to do."""

    backend: str
    """`module:class`."""
    subject: str
    artefact: str
    """Empty folder to write into."""
    result: str
    """JSON file to write."""
    precision: str = "fp32"
    variant: str = ""
    """One of the backend's `variants`."""
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    seconds: float = 4.0
    """For timing one batch size with one number of threads; 0: not timed."""
    compiled: bool = True
    """Whether torch.compile is timed, too."""
    task: str = "export"
    """`export`; `serve`: load the finished artefact as a server would, and say how much memory it takes; `time`: time it."""


class Report:
    """The result file, written anew after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = {"status": "crashed", "stage": "starting"}

    def set(self, **values: Any) -> None:
        """Change the values and write them."""
        self.values.update(values)
        aside = self._path.with_suffix(".part")
        aside.write_text(json.dumps(self.values), encoding="utf-8")
        aside.replace(self._path)


def main(path: str) -> int:
    """Do what the request says; 0 when the result file says all."""
    request = Request(**json.loads(Path(path).read_text(encoding="utf-8")))
    report = Report(Path(request.result))
    report.set()
    try:
        if request.task == "serve":
            _serve(request, report)
        elif request.task == "time":
            _time(request, report)
        else:
            _export(request, report)
    except PlaitError as problem:
        report.set(status="failed", error=problem.message, hint=problem.hint)
    except Exception as problem:
        report.set(status="failed", **_explained(problem, request))
    report.set(peak_bytes=peak_bytes())
    return 0


def _explained(problem: Exception, request: Request) -> dict[str, Any]:
    text = _plain(f"{type(problem).__name__}: {problem}")
    texts, cause = [text], problem.__cause__ or problem.__context__
    while cause is not None:
        texts.append(_plain(f"{type(cause).__name__}: {cause}"))
        cause = cause.__cause__ or cause.__context__
    chain = "\n".join(texts)
    found: dict[str, Any] = {
        "error": _in_short(text, texts),
        "detail": chain[-6000:],
        "trace": traceback.format_exc()[-6000:],
    }
    if "No space left on device" in chain or "File too large" in chain or "Errno 28" in chain:
        found["error"] = f"the disk is full: {_first_lines(text)}"
    with suppress(Exception):  # what cannot be blamed stays unblamed
        from plait.serve.blame import blame

        subject = Subject.read(Path(request.subject))
        programs = [subject.program(name) for name in subject.entries]
        # From the innermost on: what is around it may show the whole graph, in which every operator is named.
        blamed = next(filter(None, (blame(t, program) for t in reversed(texts) for program in programs)), None)
        if blamed is not None:
            found.update(operator=blamed.operator, where=blamed.where)
    return found


def _in_short(text: str, texts: list[str]) -> str:
    """The lines that say what is lacking, where there are any, which may stand far down; else the first ones, and the cause's."""
    for one in reversed(texts):
        telling = [line.strip(" -") for line in one.splitlines() if _LACKING.search(line)]
        if telling:
            return _first_lines("\n".join([text.partition(":")[0] + ":", *dict.fromkeys(telling)]), 400)
    if texts[-1] in text:
        return _first_lines(text)
    return f"{_first_lines(text, 160)} (because of {_first_lines(texts[-1])})"


def _plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip()


def _first_lines(text: str, limit: int = 300) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:limit]


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _export(request: Request, report: Report) -> None:
    import torch

    from plait.serve.attempt import make
    from plait.serve.registry import backend_at
    from plait.serve.timing import time_all

    torch.set_num_threads(max(request.threads))
    backend = backend_at(request.backend)
    backend.variant = request.variant
    subject = backend.part(Subject.read(Path(request.subject)))
    report.set(stage="looking", expected=backend.status, keeps=backend.keeps)
    missing = backend.missing()
    if missing:
        report.set(status="missing", error=missing)
        return
    refusal = backend.refusal(subject, request.precision)
    if refusal:
        report.set(status="refused", error=refusal)
        return
    folder, threads = Path(request.artefact), max(request.threads)
    subject = make(backend, subject, folder, request.precision, threads, report)
    facts = report.values["facts"]
    if backend.status == "prepared":
        report.set(status="prepared", stage="done")
        return
    report.set(stage="running the data")
    _run_data(backend, subject, folder, facts, request)
    if "decode" in subject.entries:
        from plait.serve.decoding.generation import generation

        report.set(stage="generating")
        found = generation(backend, subject, folder, facts, request.precision, threads, timed=request.seconds > 0)
        report.set(generation=found)
    if request.seconds:
        report.set(stage="timing")
        time_all(backend, subject, folder, facts, request, report)
    report.set(status="ok", stage="done")


def _run_data(backend: Backend, subject: Subject, folder: Path, facts: Mapping[str, Any], request: Request) -> None:
    """Outputs for the user's data, for the parent, which knows the task's loss."""
    from safetensors.torch import save_file

    from plait.serve.attempt import serves

    for name, entry in subject.entries.items():
        samples = [sample for sample in entry.data if serves(sample.sizes, facts)]
        if not samples:
            continue
        artefact = Artefact(
            folder=folder,
            entry=entry,
            precision=request.precision,
            threads=max(request.threads),
            facts=facts,
            subject=subject,
        )
        run = backend.load(artefact)
        for sample in samples:
            outputs = run(subject.inputs(sample, name))
            held = {s.name: t.detach().contiguous().clone() for s, t in zip(entry.outputs, outputs, strict=True)}
            save_file(held, Path(request.result).parent / f"got-{sample.file}")


def _time(request: Request, report: Report) -> None:
    from plait.serve.registry import backend_at
    from plait.serve.timing import time_all

    backend, folder = backend_at(request.backend), Path(request.artefact)
    subject = backend.part(Subject.read(Path(request.subject)))
    facts: Mapping[str, Any] = {}
    if backend.keeps:
        from plait.serve.manifest import Manifest

        facts = Manifest.read(folder).facts
    time_all(backend, subject, folder, facts, request, report)
    report.set(status="ok", stage="done")


def _serve(request: Request, report: Report) -> None:
    import torch

    from plait.serve.attempt import serves
    from plait.serve.served import load

    torch.set_num_threads(max(request.threads))
    subject = Subject.read(Path(request.subject))
    before = _fresh_peak()
    served = load(request.artefact, threads=max(request.threads))
    for name in served.manifest.entries:
        samples = [s for s in subject.entries[name].samples if serves(s.sizes, served.manifest.facts)]
        sample = max(samples, key=lambda s: s.sizes.get("batch", 0))
        served.entry(name)(*subject.inputs(sample, name))
    report.set(status="ok", before_bytes=before, serving_bytes=_high_water())


def _fresh_peak() -> int:
    """Resident memory now, from which the high-water mark starts again (Linux; elsewhere it stays as it was)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _high_water()


def _high_water() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return peak_bytes()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
