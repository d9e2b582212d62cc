"""One configuration under trial: a live process that times calls when it is its turn, and is stopped when it is not.

Stopped, because idle threads may spin for ever (OMP_WAIT_POLICY=ACTIVE), on the cores of the one whose turn it is.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plait.serve.isolate import environment_of
from plait.serve.tuning.record import Configuration

__all__ = ["CALLS", "Trial"]

CALLS = 5
"""Of a turn, in a row: a runtime's threads spin for a moment after a call, which would fall into another one's time."""
_SLOW = 0.2  # s; a call that takes longer is timed alone


class Trial:
    """A process that starts when this is made; `error` says why it could not load, or what it died of.

    `interpreter`: the Python that has the artefact's runtime; `openmp`: whether its threads are OpenMP's.
    """

    def __init__(self, configuration: Configuration, *, interpreter: str, openmp: bool, limit: float) -> None:
        self.configuration = configuration
        self.seconds: list[float] = []
        self.error = ""
        self.slow = False
        self._limit = limit
        self._folder = tempfile.TemporaryDirectory(prefix="plait-tune-")
        folder = Path(self._folder.name)
        path = folder / "configuration.json"
        path.write_text(json.dumps(asdict(configuration)), encoding="utf-8")
        # What the user set for OpenMP is for the default; here each configuration says its own.
        own = {
            k: v for k, v in environment_of(interpreter, folder).items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))
        }
        self._process = subprocess.Popen(
            [interpreter, "-m", "plait.serve.tuning.worker", configuration.artefact, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=own | configuration.environment(openmp=openmp),
            start_new_session=True,
        )

    def is_ready(self) -> bool:
        """Wait until it has loaded the artefact; False where it could not, with `error`."""
        answer = self._answer()
        if answer is not None and "error" in answer:
            self.error = str(answer["error"])
        elif answer is not None:
            self.slow = float(answer["seconds"]) > _SLOW
        self._signal("SIGSTOP")
        return not self.error

    @property
    def cost(self) -> float:
        """Median seconds a sample; infinite without a measurement."""
        if not self.seconds or self.error:
            return float("inf")
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 2] / self.configuration.batch

    def measure(self, *, slow: bool) -> None:
        """One turn: a few calls, or where some are `slow` one; the process stands still otherwise."""
        if self.error:
            return
        self._signal("SIGCONT")
        self._ask(slow)
        self._signal("SIGSTOP")

    def _ask(self, slow: bool) -> None:
        assert self._process.stdin is not None
        try:
            asked = {"calls": 1 if slow else CALLS, "warm": not slow}
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.error = f"the process ended with {self._process.wait()}"
            return
        answer = self._answer()
        if answer is not None and "seconds" in answer:
            self.seconds += [float(s) for s in answer["seconds"]]
        elif answer is not None:
            self.error = str(answer["error"])

    def _signal(self, name: str) -> None:
        """To all of its processes; on systems that have none of these signals idle ones go on spinning."""
        number = getattr(signal, name, None)
        # Once it was waited for, its number may be another process's.
        if number is not None and self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self._limit)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self.error = (
                f"no answer in {self._limit:.0f} s" if not ready else f"the process ended with {self._process.wait()}"
            )
            return None
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._signal("SIGCONT")
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()
