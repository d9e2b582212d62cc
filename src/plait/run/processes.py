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
from plait.hardware.placement import Placement, place_here, places_here

__all__ = ["Workers", "settle_under_launcher", "spawn"]

GRACE_SECONDS = 10.0
"""How long the others may take to end by themselves after one process failed."""


def spawn(function: Callable[..., Any], *, devices: int, args: tuple[Any, ...] = (), threads: int = 0) -> list[Any]:
    """`function(*args)` in each of `devices` new processes that can form a process group; their results by rank.

    The function must be importable (defined at the top of a module). `threads` a process; 0: threads and cores as
    `plait.hardware.placement` chooses them.

    Raises:
        WorkerError: a process died or raised; a PlaitError of theirs is raised as it was.
    """
    with Workers(devices, threads=threads) as workers:
        return workers.call(function, *args)


class Workers:
    """`devices` processes that stay. Use as a context manager; processes start at the first call.

    `threads` a process, on any core; 0: threads and cores as `plait.hardware.placement` chooses them.
    """

    def __init__(self, devices: int, *, threads: int = 0) -> None:
        self._devices = devices
        self._placements = (
            places_here(devices)
            if threads == 0
            else (Placement(threads=threads, cpus=(), places=(), memory=(), reason=""),) * devices
        )
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
        try:
            for rank, placement in enumerate(self._placements):
                os.environ.update(placement.environment())
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, theirs, placement), daemon=True)
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


def _serve(rank: int, pipe: multiprocessing.connection.Connection, placement: Placement) -> None:
    """A worker's life: calls from the pipe until it says None or closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    settle(placement, is_first=rank == 0)
    import torch.distributed as dist

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


def settle(placement: Placement, *, is_first: bool = False) -> None:
    """Keep this process to its threads and cores; the first one says so. Call it before anything starts threads.

    A process that drives an accelerator is left on all cores: which of them are near it is not known here.
    """
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    is_pinned = placement.pin()
    import torch

    torch.set_num_threads(placement.threads)
    has_accelerator = os.environ.get("PLAIT_DEVICE") != "cpu" and torch.accelerator.is_available()
    if is_pinned and has_accelerator:
        os.sched_setaffinity(0, before)
    elif is_first and placement.reason and not has_accelerator:
        sys.stderr.write(placement.reason + "\n")
        sys.stderr.flush()


def settle_under_launcher() -> None:
    """The same for a process that torchrun (or another launcher) started.

    Nothing is done where the launcher does not say how many processes share this node, nor a second time in the same
    process: what it may use then is its own share already.
    """
    count, index = os.environ.get("LOCAL_WORLD_SIZE", ""), os.environ.get("LOCAL_RANK", "")
    if os.environ.get("PLAIT_PLACED") == str(os.getpid()):
        return
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        return
    placement = place_here(int(count), int(index))
    os.environ["PLAIT_PLACED"] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(placement.threads))
    settle(placement, is_first=os.environ.get("RANK") == "0")


def _end_with(parent: Any) -> None:
    """No orphans: this process ends when its parent does, however that ended."""
    parent.join()
    os._exit(1)
