"""What a run says while it goes: a progress bar, a line of JSON a step, TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["Log", "say_on_stderr"]


class Log:
    """Progress to stderr and records to the run directory, from the first process; silent in the others."""

    def __init__(self, run_dir: Path, *, first: bool, quiet: bool = False, append: bool = False) -> None:
        self._first = first
        self._console = Console(file=sys.stderr, quiet=quiet or not first, emoji=False)
        self._file: Any = None
        self._board: Any = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if not first:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / "log.jsonl").open("a" if append else "w", encoding="utf-8")
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def say(self, text: str) -> None:
        """A line for a person."""
        self._console.print(text, highlight=False)

    def begin(self, total: int, done: int) -> None:
        """Show the bar."""
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("training", total=total, completed=done, loss="-", rate="")
        self._progress.start()

    def step(self, step: int, loss: float, samples_per_s: float, tokens_per_s: float, rate: float | None) -> None:
        """Record a step."""
        record = {"step": step, "loss": loss, "samples_per_s": samples_per_s, "tokens_per_s": tokens_per_s}
        if rate is not None:
            record["learning_rate"] = rate
        self._record(record, step)
        if self._progress is not None and self._task is not None:
            per_second = (
                f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s > samples_per_s else f"{samples_per_s:,.1f} samples/s"
            )
            self._progress.update(self._task, completed=step, loss=f"{loss:.4f}", rate=per_second)

    def advance(self, step: int) -> None:
        """Move the bar only."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)

    def evaluation(self, step: int, loss: float) -> None:
        """Record an evaluation."""
        self._record({"step": step, "evaluation_loss": loss}, step)
        self.say(f"step {step}: evaluation loss {loss:.4f}")

    def _record(self, record: dict[str, Any], step: int) -> None:
        if not self._first:
            return
        self._file.write(json.dumps({**record, "time": time.time()}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, step)


def say_on_stderr(text: str) -> None:
    """A line for a person, before there is a log."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
