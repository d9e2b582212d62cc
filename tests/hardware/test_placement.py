"""Threads and cores from a thread curve and a fake /sys; NUMA machines cannot be had here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.errors import HardwareError, RequestError
from plait.hardware.placement import (
    NumaNode,
    Topology,
    _main,
    place,
    places_here,
    read_topology,
    thread_curve,
    threads_for,
)
from plait.hardware.probe import Measured, Probe

PERFECT = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}
FLAT = {1: 1.0, 2: 1.9, 4: 1.93, 8: 1.5}


def fake_sys(root: Path, nodes: list[list[int]], siblings: int = 1, quota: str = "") -> Path:
    """/sys of a machine whose NUMA nodes have these CPUs; CPU c and c + half are one core where `siblings` is 2."""
    cpus = [cpu for node in nodes for cpu in node]
    half = len(cpus) // siblings
    for cpu in cpus:
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        same = sorted({cpu % half + i * half for i in range(siblings)})
        (folder / "thread_siblings_list").write_text(",".join(map(str, same)) + "\n")
    for index, node in enumerate(nodes):
        folder = root / f"sys/devices/system/node/node{index}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text((",".join(map(str, node)) if node else "") + "\n")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    if quota:
        (root / "sys/fs/cgroup/cpu.max").write_text(quota)
    return root


def two_nodes(cores: int = 4) -> Topology:
    nodes = (range(cores), range(cores, 2 * cores))
    return Topology(nodes=tuple(NumaNode(index=i, cores=tuple((c,) for c in cpus)) for i, cpus in enumerate(nodes)))


def probe(*figures: tuple[str, float, str]) -> Probe:
    return Probe(
        host="h", processor="p", cores=4, memory_bytes=1e9, backend="gloo", torch_version="2", date="2026-11-24",
        seconds=1.0, figures=tuple(Measured(name=n, value=v, unit=u, spread=0.0, repeats=3) for n, v, u in figures),
    )  # fmt: skip


def test_the_curve_is_a_mean_of_rates_and_of_inverse_times():
    """A rate twice as high and a time twice as long cancel out."""
    found = thread_curve(
        probe(("copy/threads=1", 10.0, "B/s"), ("copy/threads=4", 40.0, "B/s"),
              ("operator/threads=1", 1.0, "s"), ("operator/threads=4", 4.0, "s"), ("send/ranks=2/8", 1.0, "s"))
    )  # fmt: skip

    assert found == pytest.approx({1: 1.0, 4: 1.0})


def test_a_probe_without_one_thread_is_refused():
    """There is nothing to compare with."""
    with pytest.raises(HardwareError, match="one thread"):
        thread_curve(probe(("copy/threads=4", 40.0, "B/s")))


@pytest.mark.parametrize(
    ("curve", "cores", "threads"),
    [(None, 6, 6), (PERFECT, 8, 8), (PERFECT, 3, 3), (FLAT, 8, 2), (FLAT, 1, 1), ({1: 1.0}, 16, 1), (PERFECT, 16, 8)],
)
def test_threads_stop_where_they_no_longer_pay(curve, cores: int, threads: int):
    """The fewest within 3 % of the best; beyond what was measured nothing is assumed."""
    assert threads_for(curve, cores) == threads


def test_neighbours_in_rank_share_a_node():
    """Four processes on two nodes of four cores: two cores each, the first two on the first node."""
    found = place(4, two_nodes(), PERFECT)

    assert [one.cpus for one in found] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [one.memory for one in found] == [(0,), (0,), (1,), (1,)]
    assert {one.threads for one in found} == {2}
    assert found[2].numactl() == ("numactl", "--physcpubind=4,5", "--preferred=1")


def test_one_process_takes_the_second_node_only_when_it_pays():
    """A curve that goes on rising: both, memory interleaved; one that does not: the first node alone."""
    (both,) = place(1, two_nodes(), PERFECT)
    (first,) = place(1, two_nodes(), FLAT)

    assert both.threads == 8
    assert both.numactl() == ("numactl", "--interleave=0,1")
    assert first.threads == 2
    assert first.cpus == (0, 1, 2, 3)
    assert first.numactl() == ("numactl", "--physcpubind=0,1,2,3", "--preferred=0")


@pytest.mark.parametrize("processes", range(1, 18))
def test_every_core_has_work_and_no_process_straddles_nodes_for_nothing(processes: int):
    """For any number: as many placements, equal threads, no core twice while there are enough, none idle."""
    found = place(processes, two_nodes(), PERFECT)
    used = [cpu for one in found for cpu in one.cpus or range(8)]

    assert len(found) == processes
    assert len({one.threads for one in found}) == 1
    assert set(used) == set(range(8))
    assert processes > 8 or len(used) == 8
    if processes >= 2:
        assert all(len(one.memory) == 1 for one in found)


def test_more_processes_than_cores_move_freely_in_their_node():
    """One thread each, all cores of the node."""
    found = place(16, two_nodes(), PERFECT)

    assert found[0].cpus == (0, 1, 2, 3)
    assert found[15].cpus == (4, 5, 6, 7)
    assert found[0].threads == 1
    assert found[0].environment(bind=True) == {"OMP_NUM_THREADS": "1"}


def test_threads_count_cores_not_their_second_halves(tmp_path: Path):
    """Two threads of a core are one core; each process has both."""
    topology = read_topology(fake_sys(tmp_path, [[0, 1, 4, 5], [2, 3, 6, 7]], siblings=2), range(8))
    found = place(2, topology, None)

    assert topology.cores == 4
    assert [one.cpus for one in found] == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert found[0].threads == 2
    assert found[1].environment(bind=True)["OMP_PLACES"] == "{2,6},{3,7}"


def test_a_mask_and_a_quota_are_kept(tmp_path: Path):
    """CPUs that this process may not use are not counted; a container's time limit bounds the threads."""
    root = fake_sys(tmp_path, [[0, 1, 2, 3], [4, 5, 6, 7]], quota="300000 100000\n")
    topology = read_topology(root, {2, 3, 4, 5, 6})

    assert [node.cores for node in topology.nodes] == [((2,), (3,)), ((4,), (5,), (6,))]
    assert topology.quota == 3
    assert {one.threads for one in place(2, topology, None)} == {1}
    assert "time for 3" in place(2, topology, None)[0].reason
    assert place(1, topology, None)[0].threads == 3


@pytest.mark.parametrize("text", ["", "0-", "nonsense", "-1", "0-3;4"])
def test_an_unreadable_sys_is_one_node(tmp_path: Path, text: str):
    """Nothing is made up: the CPUs that may be used, one core each."""
    root = fake_sys(tmp_path, [[0, 1], [2, 3]], quota="max 100000")
    (root / "sys/devices/system/node/node1/cpulist").write_text(text)
    topology = read_topology(root, range(4))

    assert topology == Topology(nodes=(NumaNode(index=0, cores=((0,), (1,), (2,), (3,))),))


def test_a_node_of_memory_alone_gets_no_process(tmp_path: Path):
    """Memory expansion cards are nodes without CPUs."""
    topology = read_topology(fake_sys(tmp_path, [[0, 1], []]), range(2))

    assert [node.index for node in topology.nodes] == [0]
    assert place(2, topology)[1].memory == ()


def test_old_control_groups_have_a_quota_too(tmp_path: Path):
    """Version 1: microseconds of a period, -1 for no limit."""
    root = fake_sys(tmp_path, [[0, 1, 2, 3]])
    folder = root / "sys/fs/cgroup/cpu"
    folder.mkdir()
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    for text, quota in (("150000\n", 1.5), ("-1\n", None)):
        (folder / "cpu.cfs_quota_us").write_text(text)

        assert read_topology(root, range(4)).quota == quota


@pytest.mark.parametrize(
    ("given", "words"),
    [({"OMP_NUM_THREADS": "7"}, "OMP_NUM_THREADS=7 is set and wins"), ({"PLAIT_PIN": "0"}, "PLAIT_PIN=0 is set"),
     ({"KMP_AFFINITY": "none"}, "KMP_AFFINITY is set")],
)  # fmt: skip
def test_the_users_own_choice_wins_and_is_said(given: dict[str, str], words: str):
    """What is set in the environment is left alone."""
    found = places_here(1, given)[0]

    assert words in found.reason
    assert found.threads == int(given.get("OMP_NUM_THREADS", found.threads))
    assert found.cpus == ()


@pytest.mark.parametrize("text", ["none", "0", "-1", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(text: str):
    """Said before a process starts."""
    with pytest.raises(RequestError, match="OMP_NUM_THREADS"):
        places_here(1, {"OMP_NUM_THREADS": text})


def test_no_processes_cannot_be_placed():
    """Nor can any on no core."""
    for processes, topology in ((0, two_nodes()), (1, Topology(nodes=()))):
        with pytest.raises(RequestError, match="cannot be placed"):
            place(processes, topology)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_pinned_process_stays_on_its_cores():
    """The system says so afterwards; a core that is not there is refused without harm."""
    own = min(os.sched_getaffinity(0))
    code = (
        "import os; from plait.hardware.placement import Placement\n"
        f"p = Placement(threads=1, cpus=({own},), places=(), memory=(), reason='')\n"
        "print(p.pin(), sorted(os.sched_getaffinity(0)), Placement(threads=1, cpus=(9999,), places=(), memory=(),"
        " reason='').pin())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout

    assert out.strip() == f"True [{own}] False"


def test_a_probe_of_other_things_stops_nothing(monkeypatch: pytest.MonkeyPatch):
    """It was kept by another version: a thread for each core, and that it was not measured is said."""
    monkeypatch.setattr("plait.hardware.placement.load_probe", lambda: probe(("copy/threads=4", 40.0, "B/s")))

    assert "not measured" in places_here(1, {})[0].reason


def test_the_words_before_a_servers_command(monkeypatch: pytest.MonkeyPatch):
    """numactl where there are NUMA nodes and it is installed, else taskset, else the threads alone."""
    one, near = place(2, two_nodes(), PERFECT)
    (everywhere,) = place(1, Topology(nodes=(NumaNode(index=0, cores=((0,), (1,))),)), PERFECT)
    monkeypatch.setattr("plait.hardware.placement.shutil.which", lambda name: f"/usr/bin/{name}")

    assert near.start() == ("env", "OMP_NUM_THREADS=4", "numactl", "--physcpubind=4,5,6,7", "--preferred=1")
    assert everywhere.start() == ("env", "OMP_NUM_THREADS=2")
    monkeypatch.setattr("plait.hardware.placement.shutil.which", lambda name: name == "taskset" or None)
    assert one.start() == ("env", "OMP_NUM_THREADS=4", "taskset", "-c", "0,1,2,3")
    monkeypatch.setattr("plait.hardware.placement.shutil.which", lambda name: None)
    assert one.start() == ("env", "OMP_NUM_THREADS=4")


def test_a_start_file_asks_for_one_of_its_processes(capsys: pytest.CaptureFixture[str]):
    """By its number; one that is none of them is refused."""
    assert _main(["--processes", "1", "--start"]) == 0
    assert capsys.readouterr().out.startswith("env OMP_NUM_THREADS=")
    assert _main(["--processes", "2", "--index", "2", "--start"]) == 2
    assert "--index 2 is none of 2 processes" in capsys.readouterr().err
