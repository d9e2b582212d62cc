"""A process that runs one tuning trial's configuration: it loads an artefact and times calls when asked.

    python -m plait.serve.tune_worker FOLDER CONFIG.json

Reads lines `{"calls": n}` from stdin and answers `{"seconds": [...]}`; the first line it writes is `{"ready": true}` or
`{"error": ...}`. Threads, cores and the runtime's environment are set before anything that computes is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(folder: str, config_file: str) -> int:
    """Serve until stdin ends."""
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a runtime prints must not come between the answers
    try:
        run = _loaded(Path(folder), config)
        run()
        run()
    except Exception as problem:  # a configuration that a runtime refuses is a result of its trial
        lines = str(problem).strip().splitlines() or [""]
        _answer(answers, error=f"{type(problem).__name__}: {lines[0][:200]}")
        return 0
    _answer(answers, ready=True)
    for line in sys.stdin:
        calls = int(json.loads(line)["calls"])
        run()
        seconds = []
        for _ in range(calls):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        _answer(answers, seconds=seconds)
    return 0


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
    inputs = _inputs(function.spec, config["batch"])
    return lambda: function(*inputs)


def _inputs(entry: Any, batch: int) -> list[Any]:
    """Inputs of an entry point at a batch size and every other open size at its most: zeros where they are whole numbers."""
    import torch

    generator = torch.Generator().manual_seed(0)
    found = []
    for spec in entry.inputs:
        shape = [s if isinstance(s, int) else batch if s == "batch" else entry.dims[s][1] for s in spec.shape]
        dtype = getattr(torch, spec.dtype)
        values = torch.randn(shape, generator=generator) if dtype.is_floating_point else torch.zeros(shape)
        found.append(values.to(dtype))
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
