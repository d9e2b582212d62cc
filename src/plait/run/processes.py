"""Processes on this computer: started, watched, stopped together.

`spawn` runs one function in N processes. `Workers` keep them for many calls (importing torch takes seconds). When one
process fails, the others, who may wait for it in a collective, are given a few seconds and then ended.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from plait.errors import PlaitError, WorkerError

__all__ = ["Workers", "spawn"]

GRACE_SECONDS = 10.0
"""How long the others may take to end by themselves after one process failed."""


def spawn(function: Callable[..., Any], *, devices: int, args: tuple[Any, ...] = (), threads: int = 0) -> list[Any]:
    """`function(*args)` in each of `devices` new processes that can form a process group; their results by rank.

    The function must be importable (defined at the top of a module). `threads` a process; 0: cores / devices.

    Raises:
        WorkerError: a process died or raised; a PlaitError of theirs is raised as it was.
    """
    with Workers(devices, threads=threads) as workers:
        return workers.call(function, *args)


class Workers:
    """`devices` processes that stay. Use as a context manager; processes start at the first call."""

    def __init__(self, devices: int, *, threads: int = 0) -> None:
        self._devices = devices
        self._threads = threads or max(1, (os.cpu_count() or 1) // devices)
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="plait-")
        self._calls = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._folder.cleanup()

    @property
    def pids(self) -> list[int]:
        """Process ids, empty before the first call."""
        return [process.pid for process in self._processes]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Children read these before torch starts its thread pool.
        kept = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "PYTHONUNBUFFERED")}
        os.environ["OMP_NUM_THREADS"] = str(self._threads)
        try:
            for rank in range(self._devices):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, theirs, self._threads), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        finally:
            for name, value in kept.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def call(
        self, function: Callable[..., Any], *args: Any, devices: int | None = None, timeout: float | None = None
    ) -> list[Any]:
        """`function(*args)` in the first `devices` processes (all by default); their results by rank.

        Raises:
            WorkerError: a process died, raised, or `timeout` seconds passed. All processes are ended then and start
                anew at the next call.
        """
        count = devices or self._devices
        if not self._processes:
            self._start()
        self._calls += 1
        store = str(Path(self._folder.name) / f"store-{self._calls}")
        for pipe in self._pipes[:count]:
            pipe.send((function, args, count, store))
        try:
            return self._collect(count, None if timeout is None else time.monotonic() + timeout)
        except BaseException:
            self.close()
            raise

    def _collect(self, count: int, deadline: float | None) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, PlaitError] = {}
        while len(results) + len(failures) < count:
            waiting = [r for r in range(count) if r not in results and r not in failures]
            handles = {self._pipes[r]: r for r in waiting}
            wait = 1.0 if deadline is None else max(0.0, min(1.0, deadline - time.monotonic()))
            for handle in multiprocessing.connection.wait(list(handles), timeout=wait):
                rank = handles[handle]  # type: ignore[index]
                try:
                    good, value = self._pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(5)
                    good, value = False, _died(rank, self._processes[rank].exitcode)
                if good:
                    results[rank] = value
                else:
                    failures[rank] = value
                    limit = time.monotonic() + GRACE_SECONDS
                    deadline = limit if deadline is None else min(deadline, limit)
            if deadline is not None and time.monotonic() >= deadline and len(results) + len(failures) < count:
                break
        if failures:
            raise _first_cause(failures)
        if len(results) < count:
            raise WorkerError("processes: no answer within the time limit", hint="look at the output of the processes")
        return [results[rank] for rank in range(count)]

    def close(self) -> None:
        """End the processes: kindly, then not."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except (BrokenPipeError, OSError):
                continue
        for process in self._processes:
            process.join(0.5)
        for action in ("terminate", "kill"):
            for process in self._processes:
                if process.is_alive():
                    getattr(process, action)()
            for process in self._processes:
                process.join(3)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _died(rank: int, code: int | None) -> WorkerError:
    how = f"was ended by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
    hint = "signal KILL often means that memory ran out" if code == -9 else "its own output says more"
    return WorkerError(f"process {rank} {how} before it was done", hint=hint)


def _first_cause(failures: dict[int, PlaitError]) -> PlaitError:
    """The failure to show: one process's own error rather than another's broken connection to it."""

    def order(item: tuple[int, PlaitError]) -> tuple[int, int]:
        rank, error = item
        secondary = any(word in str(error) for word in ("Connection", "connection", "gloo", "Timed out"))
        return (0 if not isinstance(error, WorkerError) else 2 if secondary else 1, rank)

    return min(failures.items(), key=order)[1]


def _serve(rank: int, pipe: multiprocessing.connection.Connection, threads: int) -> None:
    """A worker's life: calls from the pipe until it says None or closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    while True:
        try:
            call = pipe.recv()
        except (EOFError, OSError):
            return
        if call is None:
            return
        function, args, size, store = call
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), PLAIT_STORE=store)
        try:
            answer: tuple[bool, Any] = (True, function(*args))
        except PlaitError as error:
            answer = (False, error)
        except BaseException as error:
            sys.stderr.write(f"[process {rank}]\n{traceback.format_exc()}")
            sys.stderr.flush()
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = (str(error).strip().splitlines() or [""])[0]
            answer = (
                False,
                WorkerError(f"process {rank}: {type(error).__name__}: {text} ({last.filename}:{last.lineno})"),
            )
        if answer[0] and dist.is_initialized():
            dist.destroy_process_group()
        pipe.send(answer)
        if not answer[0]:
            return


def _end_with(parent: Any) -> None:
    """No orphans: this process ends when its parent does, however that ended."""
    parent.join()
    os._exit(1)
