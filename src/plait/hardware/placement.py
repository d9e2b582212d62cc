"""Threads, cores and memory of the processes that share a computer's CPU.

    probe's curve (speed by threads) ─┐
    cores, NUMA nodes, time quota ────┼─▶ place(processes) ─▶ one Placement each ─▶ OMP_..., affinity, numactl
    number of processes ──────────────┘

Rules, for two NUMA nodes of four cores (`a` to `d` are processes):

    1 process   aaaa aaaa   both nodes if the curve says that the second one still pays, else aaaa ....
    2           aaaa bbbb   a node each; what a process writes first lies in its own node's memory
    4           aabb ccdd   neighbours in rank, who talk most, share a node
    16          one node's cores for eight of them, one thread each: more processes than cores move freely
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from plait.errors import HardwareError, PlaitError, RequestError
from plait.hardware.probe import Probe, load_probe
from plait.schema.records import Record

__all__ = [
    "NumaNode", "Placement", "Topology", "place", "place_here", "places_here", "read_topology", "thread_curve",
    "threads_for",
]  # fmt: skip

_WORTH = 0.03
"""Threads that speed a process up by less than this share are left to others: below the probe's own spread."""
_USERS_OWN = ("OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
"""Where one of these is set, somebody has decided already which cores are used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NumaNode(Record):
    """Cores that share a memory controller."""

    index: int
    cores: tuple[tuple[int, ...], ...]
    """The logical CPUs of each physical core, those that this process may use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology(Record):
    """The part of a computer's CPU that this process may use."""

    nodes: tuple[NumaNode, ...]
    quota: float | None = None
    """CPUs' worth of time that a container may use (cgroup); None: no limit."""

    @property
    def cores(self) -> int:
        """Physical cores."""
        return sum(len(node.cores) for node in self.nodes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement(Record):
    """Where one process works."""

    threads: int
    cpus: tuple[int, ...]
    """Logical CPUs that it keeps to; empty: it is left where it is."""
    places: tuple[tuple[int, ...], ...]
    """The physical cores among them, one for each thread where each thread is to keep to one."""
    memory: tuple[int, ...]
    """NUMA nodes whose memory it should use; empty: there is only one."""
    reason: str

    def environment(self, *, bind: bool = False) -> dict[str, str]:
        """Variables for the process, to be set before torch is loaded.

        `bind` keeps every thread to one core. It is for a process that starts nothing else: with it the main thread, too,
        keeps to one core, and what that thread starts later (gloo's threads, data loaders) inherits this one core.
        """
        found = {"OMP_NUM_THREADS": str(self.threads)}
        if bind and self.places:
            found["OMP_PROC_BIND"] = "close"
            found["OMP_PLACES"] = ",".join("{" + ",".join(map(str, place)) + "}" for place in self.places)
            # Intel's OpenMP reads its own variable first.
            found["KMP_AFFINITY"] = "granularity=core,compact,1,0"
        return found

    def numactl(self) -> tuple[str, ...]:
        """The command to put before the process's own; empty where there is one NUMA node.

        Memory of one node is preferred, not forced: when it is full, the next one is slower, but nothing is killed.
        """
        if not self.memory:
            return ()
        one = len(self.memory) == 1
        where = f"--preferred={self.memory[0]}" if one else f"--interleave={','.join(map(str, self.memory))}"
        return ("numactl", f"--physcpubind={','.join(map(str, self.cpus))}", where) if self.cpus else ("numactl", where)

    def start(self) -> tuple[str, ...]:
        """What to put before a server's command, so that it starts with its threads, on its cores and near its memory.

        `env` with OMP_NUM_THREADS, then numactl where there are NUMA nodes, or taskset; without these two where they are not installed.
        """
        numactl, taskset = self.numactl(), ("taskset", "-c", ",".join(map(str, self.cpus)))
        keep = (
            numactl if numactl and shutil.which("numactl") else taskset if self.cpus and shutil.which("taskset") else ()
        )
        return ("env", f"OMP_NUM_THREADS={self.threads}", *keep)

    def pin(self) -> bool:
        """Keep this process (its threads from now on) to its CPUs; False where the system has no such call or refuses.

        Memory follows by itself: Linux takes a page from the node of the thread that writes it first.
        """
        if not self.cpus or not hasattr(os, "sched_setaffinity"):
            return False
        try:
            os.sched_setaffinity(0, self.cpus)
        except OSError:  # a container may forbid it; then the process stays where it is, which is slower, not wrong
            return False
        return True


def thread_curve(probe: Probe) -> dict[int, float]:
    """Speed by number of threads, 1 thread = 1: the geometric mean over matmuls, copy, addition and the bare operator.

    Raises:
        HardwareError: the probe has nothing for one thread.
    """
    ratios: dict[int, list[float]] = {}
    for figure in probe.figures:
        name, sign, threads = figure.name.rpartition("/threads=")
        if not sign or not threads.isdigit() or name.startswith("matmul/bf16") or not probe.has(f"{name}/threads=1"):
            continue
        ratio = figure.value / probe.value(f"{name}/threads=1")
        ratios.setdefault(int(threads), []).append(1 / ratio if figure.unit == "s" else ratio)
    if 1 not in ratios:
        raise HardwareError(f"the probe of {probe.host} has no figures for one thread", hint="run it again")
    return {count: math.exp(sum(map(math.log, found)) / len(found)) for count, found in sorted(ratios.items())}


def threads_for(curve: Mapping[int, float] | None, cores: int) -> int:
    """The fewest threads within 3 % of the best speed on `cores` cores; all of them where nothing was measured."""
    if curve is None:
        return max(1, cores)
    speeds = {count: _speed(curve, count) for count in range(1, max(1, cores) + 1)}
    best = max(speeds.values())
    return min(count for count, speed in speeds.items() if speed >= (1 - _WORTH) * best)


def _speed(curve: Mapping[int, float], threads: int) -> float:
    """Between two measured counts speed follows a power of the threads; beyond the last it stays."""
    known = sorted(curve)
    if threads in curve:
        return curve[threads]
    above = next((count for count in known if count > threads), None)
    below = max((count for count in known if count < threads), default=None)
    if above is None or below is None:
        return curve[known[0] if below is None else below]
    power = math.log(curve[above] / curve[below]) / math.log(above / below)
    return float(curve[below] * (threads / below) ** power)


def place(processes: int, topology: Topology, curve: Mapping[int, float] | None = None) -> tuple[Placement, ...]:
    """A placement for each of `processes` equal processes, by local rank. All get the same number of threads.

    Raises:
        RequestError: there are no processes, or no CPU may be used.
    """
    if processes < 1 or not topology.cores:
        raise RequestError(f"placement: {processes} processes on {topology.cores} cores cannot be placed")
    nodes = [node for node in topology.nodes if node.cores]  # a node may have memory alone
    shares = _few(processes, nodes) if processes < len(nodes) else _many(processes, nodes)
    budget = topology.cores if topology.quota is None else min(topology.cores, max(1, math.floor(topology.quota)))
    threads = threads_for(curve, min(*(len(cores) for cores, _ in shares), max(1, budget // processes)))
    crowded = processes > topology.cores
    why = _why(processes, topology, threads, is_measured=curve is not None, is_crowded=crowded)
    found = []
    for cores, where in shares:
        # Nodes that the threads do not reach are left out, so that a process does not straddle them for nothing.
        kept, memory = (cores, where) if processes >= len(nodes) else _within(threads, where, nodes)
        cpus = tuple(sorted(cpu for core in kept for cpu in core))
        everything = len(cpus) == sum(len(core) for node in nodes for core in node.cores)
        found.append(
            Placement(
                threads=threads,
                cpus=() if everything else cpus,
                places=() if crowded else kept[:threads],
                memory=memory if len(nodes) > 1 else (),
                reason=why,
            )
        )
    return tuple(found)


def _why(processes: int, topology: Topology, threads: int, *, is_measured: bool, is_crowded: bool) -> str:
    """Such as `2 processes on 8 cores: 4 threads each, on cores of their own (by the probe's thread curve)`."""
    what = f"{processes} process{'es' * (processes > 1)} on {topology.cores} core{'s' * (topology.cores > 1)}"
    if topology.quota is not None and topology.quota < topology.cores:
        what += f" with time for {topology.quota:g}"
    own = "" if processes == 1 else ", on any core" if is_crowded else ", on cores of their own"
    source = "by the probe's thread curve" if is_measured else "not measured: see `plait hardware probe`"
    return f"{what}: {threads} thread{'s' * (threads > 1)}{' each' * (processes > 1)}{own} ({source})"


_Share = tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]
"""(cores, NUMA nodes) of a process."""


def _few(processes: int, nodes: Sequence[NumaNode]) -> list[_Share]:
    """Fewer processes than nodes: each takes whole nodes."""
    cut = [len(nodes) * i // processes for i in range(processes + 1)]
    parts = [nodes[begin:end] for begin, end in itertools.pairwise(cut)]
    return [(tuple(c for node in part for c in node.cores), tuple(node.index for node in part)) for part in parts]


def _many(processes: int, nodes: Sequence[NumaNode]) -> list[_Share]:
    """A process lies within one node; a node's processes cut its cores into neighbours, or share all of them."""
    owners = [len(nodes) * i // processes for i in range(processes)]
    found: list[_Share] = []
    for number, node in enumerate(nodes):
        count, cores = owners.count(number), node.cores
        for i in range(count):
            own = cores if count > len(cores) else cores[len(cores) * i // count : len(cores) * (i + 1) // count]
            found.append((own, (node.index,)))
    return found


def _within(threads: int, where: tuple[int, ...], nodes: Sequence[NumaNode]) -> _Share:
    """The first of the nodes in `where` that together have a core for each thread."""
    cores: list[tuple[int, ...]] = []
    used: list[int] = []
    for node in nodes:
        if node.index in where and len(cores) < threads:
            cores += node.cores
            used.append(node.index)
    return tuple(cores), tuple(used)


def read_topology(root: Path = Path("/"), allowed: Collection[int] | None = None) -> Topology:
    """Cores, NUMA nodes and time quota of this computer as Linux shows them; elsewhere one node of single cores.

    `allowed`: the CPUs that may be used; default: those this process may use now.
    """
    if allowed is None:
        # On systems without affinity all of them.
        has_call = hasattr(os, "sched_getaffinity")
        allowed = os.sched_getaffinity(0) if has_call else range(os.cpu_count() or 1)
    folder = root / "sys/devices/system"
    nodes = []
    for path in sorted((folder / "node").glob("node[0-9]*"), key=lambda p: int(p.name[4:])):
        cpus = _numbers(path / "cpulist")
        if cores := _cores(folder, cpus & set(allowed)):
            nodes.append(NumaNode(index=int(path.name[4:]), cores=cores))
    if sum(len(core) for node in nodes for core in node.cores) != len(set(allowed)):
        nodes = [NumaNode(index=0, cores=_cores(folder, set(allowed)))]  # no NUMA, or a kernel that does not tell all
    return Topology(nodes=tuple(nodes), quota=_quota(root / "sys/fs/cgroup"))


def _cores(folder: Path, cpus: Collection[int]) -> tuple[tuple[int, ...], ...]:
    """The CPUs by physical core."""
    cores = {
        tuple(sorted((_numbers(folder / f"cpu/cpu{cpu}/topology/thread_siblings_list") or {cpu}) & set(cpus)))
        for cpu in cpus
    }
    return tuple(sorted(core for core in cores if core))


def _numbers(path: Path) -> set[int]:
    """The numbers of a list such as 0-3,8; none where the file is missing or says something else."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return set()
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        return set()
    ranges = [part.partition("-") for part in text.split(",")]
    return {n for first, _, last in ranges for n in range(int(first), int(last or first) + 1)}


def _quota(folder: Path) -> float | None:
    """CPUs' worth of time, from control groups of version 2, else 1."""
    try:
        if (folder / "cpu.max").is_file():
            text, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            text = (folder / "cpu/cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (folder / "cpu/cpu.cfs_period_us").read_text(encoding="ascii")
        value = float(text) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no limit is written as `max` or not at all
        return None
    return value if value > 0 else None  # version 1 says -1 for no limit


def places_here(processes: int, environment: Mapping[str, str] | None = None) -> tuple[Placement, ...]:
    """The placement of each of `processes` local processes on this computer, from its kept probe.

    What the user has set is left alone, and the reason says so: OMP_NUM_THREADS decides the threads; PLAIT_PIN=0, or a
    variable of OpenMP that names cores, leaves the processes on all of them.

    Raises:
        RequestError: OMP_NUM_THREADS is not a number.
    """
    environment = os.environ if environment is None else environment
    chosen = place(processes, read_topology(), _kept_curve())
    threads, reason = chosen[0].threads, chosen[0].reason
    if given := environment.get("OMP_NUM_THREADS", "").split(",")[0].strip():
        if not given.isdigit() or int(given) < 1:
            raise RequestError(f"OMP_NUM_THREADS={given!r} is not a number of threads", hint="unset it, or set it to 1")
        if int(given) != threads:
            reason = f"{reason}; OMP_NUM_THREADS={given} is set and wins"
        threads = int(given)
    own = [name for name in _USERS_OWN if environment.get(name)]
    if environment.get("PLAIT_PIN", "1") == "0" or own:
        reason = f"{reason}; {own[0] if own else 'PLAIT_PIN=0'} is set, so cores are left alone"
        return tuple(replace(one, threads=threads, cpus=(), places=(), reason=reason) for one in chosen)
    return tuple(replace(one, threads=threads, places=one.places[:threads], reason=reason) for one in chosen)


def _kept_curve() -> dict[int, float] | None:
    """None where this computer was not probed, or by a version that measured other things: nothing stops for that."""
    probe = load_probe()
    try:
        return None if probe is None else thread_curve(probe)
    except HardwareError:
        return None


def place_here(processes: int = 1, index: int = 0, environment: Mapping[str, str] | None = None) -> Placement:
    """The one of `places_here` for local process `index`; alone, a server's own."""
    return places_here(processes, environment)[index]


def _main(arguments: Sequence[str] | None = None) -> int:
    """For job files and start files: the number of threads, the words of numactl, or all words before a process's command."""
    parser = argparse.ArgumentParser(prog="python -m plait.hardware.placement", description=__doc__)
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="of this node")
    parser.add_argument(
        "--numactl", action="store_true", help="numactl's words instead, where it is installed and needed"
    )
    parser.add_argument("--start", action="store_true", help="instead: what to put before the process's command")
    parser.add_argument("--index", type=int, default=0, metavar="I", help="of the process, 0 first")
    asked = parser.parse_args(arguments)
    try:
        places = places_here(asked.processes)
        if not 0 <= asked.index < len(places):
            raise RequestError(
                f"--index {asked.index} is none of {asked.processes} processes", hint="the first one is 0"
            )
        chosen = places[asked.index]
    except PlaitError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_status
    words = chosen.start() if asked.start else chosen.numactl() if shutil.which("numactl") else ()
    sys.stdout.write(f"{' '.join(words) if asked.numactl or asked.start else chosen.threads}\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
