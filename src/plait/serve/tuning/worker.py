"""A process that runs one tuning trial's configuration: it loads an artefact and times calls when asked.

    python -m plait.serve.tuning.worker FOLDER CONFIG.json

Reads lines `{"calls": n, "warm": true}` from stdin and answers `{"seconds": [...]}`; the first line it writes has the seconds
of a call, or `{"error": ...}`. `warm`: one call before them that is not timed. Threads, cores and the runtime's environment are set before anything that computes is imported.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(folder: str, config_file: str) -> int:
    """Serve until stdin ends."""
    _end_with_parent()
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a runtime prints must not come between the answers
    try:
        run = _loaded(Path(folder), config)
        run()
        _answer(answers, seconds=_timed(run))
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["warm"]:
                run()
            _answer(answers, seconds=[_timed(run) for _ in range(asked["calls"])])
    except Exception as problem:  # a configuration that a runtime refuses is a result of its trial
        lines = str(problem).strip().splitlines() or [""]
        _answer(answers, error=f"{type(problem).__name__}: {lines[0][:200]}")
    return 0


def _timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _end_with_parent() -> None:
    """A stopped process does not see that its stdin has ended: on Linux the kernel ends it with its parent."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _answer(answers: Any, **values: Any) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def _loaded(folder: Path, config: dict[str, Any]) -> Any:
    if config["cpus"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, config["cpus"])
    from plait.serve.served import load

    served = load(folder, threads=config["threads"], knobs=config["knobs"])
    name = "forward" if "forward" in served.manifest.entries else next(iter(served.manifest.entries))
    function = served.entry(name)
    for whole in (1, 0):
        inputs = _inputs(function.spec, config["batch"], whole)
        try:
            function(*inputs)
            break
        except Exception:
            if not whole:
                raise
    return lambda: function(*inputs)


def _inputs(entry: Any, batch: int, whole: int = 1) -> list[Any]:
    """Inputs of an entry point at a batch size and every other open size at its most: normal numbers, or `whole` all over.

    Ones are tokens and masks that hide nothing; zeros are for an index into a table of one row.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    found = []
    for spec in entry.inputs:
        shape = [s if isinstance(s, int) else batch if s == "batch" else entry.dims[s][1] for s in spec.shape]
        dtype = getattr(torch, spec.dtype)
        values = torch.randn(shape, generator=generator) if dtype.is_floating_point else torch.full(shape, whole)
        found.append(values.to(dtype))
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
