"""Every engine's node script, run with that engine's environment and an interpreter that writes down what it was asked."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from plait.cli.main import run
from plait.hardware.probe import Measured, Probe

# Stands in for the interpreter: answers the question for this node's address, passes the device check, and prints
# the torchrun command, one word a line, then the environment.
PYTHON = """\
#!/bin/sh
case "$1 $2" in
    "-c "*getsockname*) echo 10.0.0.9; exit ;;
    "-c "*accelerator*) exit ;;
    "-m pip") exit ;;
    "-m plait.hardware.placement") case "$*" in *--numactl) echo "$FAKE_NUMACTL" ;; *) echo 5 ;; esac; exit ;;
esac
printf '%s\\n' "$@"
echo ENVIRONMENT
env
"""
CURL = """\
#!/bin/sh
case "$*" in
    *agent-worker-number) printf 1 ;;
    *worker-network-endpoints) printf 'unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2' ;;
esac
"""
ENGINES = {
    # engine -> (environment of node 1, the first node's name and port)
    "torchrun": ({"NODE_RANK": "1", "MASTER_ADDR": "first"}, "first:29400"),
    "slurm": ({"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_ID": "20007", "PLAIT_JOB": "launch/tiny-slurm"}, "a1:20007"),
    "parallelcluster": ({"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_ID": "7", "PLAIT_JOB": "launch/tiny-parallelcluster"}, "a1:20007"),
    "kubernetes": ({"JOB_COMPLETION_INDEX": "1"}, "tiny-0.tiny:29400"),
    "kubeflow": ({"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "tiny-node-0-0.tiny", "PET_MASTER_PORT": "29500", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8"}, "tiny-node-0-0.tiny:29500"),
    "skypilot": ({"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}, "10.0.0.1:29400"),
    "azureml": ({"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "6105", "PLAIT_RUN": "mnt"}, "10.0.0.1:6105"),
    "sagemaker": ({"SM_CURRENT_HOST_RANK": "1", "SM_MASTER_ADDR": "algo-1", "SM_MASTER_PORT": "7777", "SM_NETWORK_INTERFACE_NAME": "eth7"}, "algo-1:7777"),
    "gcp-tpu": ({}, "10.0.0.1:29400"),
    "gke-jobset": ({"JOB_COMPLETION_INDEX": "1"}, "tiny-slice-0-0.tiny:29400"),
}  # fmt: skip


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def script_of(engine: str) -> str:
    """node.sh, wherever the engine keeps it."""
    folder = Path("launch") / f"tiny-{engine}"
    if (folder / "node.sh").is_file():
        return str(folder / "node.sh")
    (first,) = (
        folder / name for name in ("job.yaml", "trainjob.yaml", "jobset.yaml", "task.yaml") if (folder / name).is_file()
    )
    document = next(yaml.safe_load_all(first.read_text(encoding="utf-8")))
    text = document["run"] if engine == "skypilot" else document["data"]["node.sh"]
    Path("node.sh").write_text(text, encoding="utf-8")
    return "node.sh"


def asked(project: Path, engine: str, **more: str) -> tuple[list[str], dict[str, str]]:
    """(torchrun's words, environment) that node 1 comes to."""
    for place in ("bin/python", "home/plait/bin/python", "home/plait/venv/bin/python"):
        executable(project / place, PYTHON)
    executable(project / "bin" / "curl", CURL)
    executable(project / "bin" / "scontrol", "#!/bin/sh\nprintf 'a1\\na2\\n'\n")
    (project / "home" / "project").mkdir(exist_ok=True)
    environment = {
        "PATH": f"{project}/bin:{os.environ['PATH']}",
        "HOME": f"{project}/home",
        **ENGINES[engine][0],
        **more,
    }
    done = subprocess.run(
        ["bash", script_of(engine)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    command, _, rest = done.stdout.partition("ENVIRONMENT\n")
    return command.splitlines(), dict(line.split("=", 1) for line in rest.splitlines() if "=" in line)


def launched(engine: str, *more: str, target: str = "tiny.py:job") -> None:
    is_tpu = engine in ("gcp-tpu", "gke-jobset")
    part, per_node = ("TPU-v5e", "4") if is_tpu else ("H100", "8")
    plan = "dp=2,tp=4" if is_tpu else "dp=4,tp=4"
    words = [
        "launch",
        target,
        "--to",
        engine,
        "--plan",
        plan,
        "--gpu-type",
        part,
        "--devices-per-node",
        per_node,
    ]
    assert run([*words, *more]) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_second_node_comes_to_the_right_torchrun(project: Path, engine: str):
    """Its number, the first node's address, the processes of a node, and `plait train` with the plan and --resume."""
    launched(engine)
    words, environment = asked(project, engine)
    value = dict(itertools.pairwise(words))

    assert words[:2] == ["-m", "torch.distributed.run"]
    assert value["--nnodes"] == "2"
    assert value["--nproc-per-node"] == ("4" if engine in ("gcp-tpu", "gke-jobset") else "8")
    assert value["--max-restarts"] == "3"
    assert value["--rdzv-endpoint"] == ENGINES[engine][1]
    assert value["--rdzv-conf"].startswith("is_host=0,")
    assert value["--local-addr"] == "10.0.0.9"
    assert value["plait"] == "train"
    assert value["train"] == "tiny.py:job"
    assert value["--plan"].endswith("plan.yaml")
    assert value["--run-dir"] not in ("", "/")
    assert words[-1] == "--resume"
    assert int(environment["OMP_NUM_THREADS"]) >= 1
    assert environment["PLAIT_TIMEOUT_S"] == "1800"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_target_reaches_train_as_it_was_typed(project: Path, engine: str):
    """Whatever stands in its arguments is neither run nor changed on its way through YAML and shell."""
    target = """tiny.py:job?rate=it's "one" $(touch hacked) `touch hacked` ${HOME} # &a=b: c"""
    launched(engine, target=target)
    words, _ = asked(project, engine)

    assert words[words.index("train") + 1] == target
    assert not list(project.rglob("hacked"))


@pytest.mark.parametrize(
    ("engine", "names"),
    [("slurm", ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")), ("gke-jobset", ("GLOO_SOCKET_IFNAME",))],
)
def test_the_interface_asked_for(project: Path, engine: str, names: tuple[str, ...]):
    """Of every library that the devices talk through."""
    launched(engine, "--interface", "ib0")
    environment = asked(project, engine)[1]

    assert [environment[name] for name in names] == ["ib0"] * len(names)


def test_hccl_for_ascend(project: Path):
    """Huawei's library has its own variable."""
    assert (
        run(
            [
                "launch",
                "tiny.py:job",
                "--to",
                "slurm",
                "--plan",
                "dp=16",
                "--gpu-type",
                "Ascend-910B",
                "--interface",
                "ib0",
            ]
        )
        == 0
    )
    environment = asked(project, "slurm")[1]

    assert environment["HCCL_SOCKET_IFNAME"] == "ib0"
    assert "NCCL_SOCKET_IFNAME" not in environment


def test_what_is_set_outside_wins(project: Path):
    """A person's own environment is kept."""
    launched("slurm")
    environment = asked(project, "slurm", OMP_NUM_THREADS="3", INTERFACE="eth9", PLAIT_TIMEOUT_S="60")[1]

    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["GLOO_SOCKET_IFNAME"] == "eth9"
    assert environment["PLAIT_TIMEOUT_S"] == "60"


def test_one_node_needs_no_rendezvous(project: Path):
    """Neither names nor ports."""
    assert run(["launch", "tiny.py:job", "--to", "torchrun", "--plan", "dp=4", "--gpu-type", "cpu"]) == 0
    words, environment = asked(project, "torchrun")

    assert "--standalone" in words
    assert "--rdzv-endpoint" not in words
    assert environment["PLAIT_DEVICE"] == "cpu"


def test_a_node_without_its_accelerators_stops(project: Path):
    """It does not train on the CPU instead: the real interpreter, the real torch."""
    launched("slurm")
    executable(project / "bin" / "scontrol", "#!/bin/sh\necho 127.0.0.1\n")
    environment = {
        **os.environ,
        **ENGINES["slurm"][0],
        "PYTHON": sys.executable,
        "PATH": f"{project}/bin:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "launch/tiny-slurm/node.sh"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 1
    assert "torch finds" in done.stderr
    assert "the plan needs 8 in each node" in done.stderr


ODD = 'it\'s $(touch pwned) `touch pwned` "x" & é'


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_folder_with_an_odd_name_is_only_a_name(project: Path, monkeypatch, nodes: int):
    """Nothing in a path is run: neither here, nor by the shell at ssh's other end."""
    odd = project / ODD
    odd.mkdir()
    (odd / "my model.py").write_text((project / "tiny.py").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(odd)
    more = ["--nodes", "2", "--hosts", "a,b"] if nodes == 2 else []
    assert run(["launch", "my model.py:job?rate=$(touch pwned)", "--to", "torchrun", "--plan", "dp=2", "--gpu-type", "cpu", *more]) == 0  # fmt: skip
    executable(project / "bin" / "python", PYTHON)
    executable(project / "bin" / "ssh", '#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    executable(project / "bin" / "nproc", "#!/bin/sh\necho 1\n")
    script = odd / "launch" / "my-model-torchrun" / ("start.sh" if nodes == 2 else "node.sh")
    environment = {"PATH": f"{project}/bin:{os.environ['PATH']}", "PYTHON": "python", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    assert f"my model.py:job?rate=$(touch pwned)\n--plan\n{odd}/launch/my-model-torchrun/plan.yaml\n" in done.stdout
    assert not list(project.rglob("pwned"))


def test_a_folder_outside_with_an_odd_name(project: Path, capsys, monkeypatch):
    """Slurm's file names the folder itself: what would be more than a name there is refused."""
    odd = project / ODD
    (odd / "here").mkdir(parents=True)
    (odd / "here" / "tiny.py").write_text((project / "tiny.py").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(odd / "here")

    assert run(["launch", "tiny.py:job", "--to", "slurm", "--plan", "dp=2", "-o", "../out"]) == 2
    assert "--output" in capsys.readouterr().err
    assert not (odd / "out").exists()


def test_home_in_a_run_directory(project: Path):
    """`--run-dir '~/runs'` is the node's home, although no shell expands ~ within quotes."""
    launched("slurm", "--run-dir", "~/my runs")
    words, _ = asked(project, "slurm")

    assert words[words.index("--run-dir") + 1] == f"{project}/home/my runs"


def measure(monkeypatch, cores: int, speeds: dict[int, float]) -> None:
    """A probe of a computer with so many cores, whose copy is so fast by threads."""
    figures = tuple(
        Measured(name=f"copy/threads={threads}", value=speed, unit="B/s", spread=0.0, repeats=3)
        for threads, speed in speeds.items()
    )
    probe = Probe(
        host="lab", processor="Z80", cores=cores, memory_bytes=1e9, backend="gloo", torch_version="2", date="2026-11-24",
        seconds=1.0, figures=figures,
    )  # fmt: skip
    monkeypatch.setattr("plait.jobs.launch.load_probe", lambda: probe)


@pytest.mark.parametrize(("cores", "given", "threads"), [("8", "", "2"), ("6", "", "5"), ("8", "3", "3")])
def test_threads_are_the_measured_ones(project: Path, monkeypatch, cores: str, given: str, threads: str):
    """On a computer like the measured one; another is asked for its own; the user's own number wins."""
    measure(monkeypatch, 8, {1: 1.0, 2: 2.0, 8: 2.0})
    assert run(["launch", "tiny.py:job", "--to", "slurm", "--plan", "dp=4", "--nodes", "2", "--gpu-type", "cpu"]) == 0
    executable(project / "bin" / "nproc", f"#!/bin/sh\necho {cores}\n")
    text = Path("launch/tiny-slurm/node.sh").read_text(encoding="utf-8")
    _, environment = asked(project, "slurm", **({"OMP_NUM_THREADS": given} if given else {}))

    assert text.count("plait.hardware.placement --processes 2") == 1
    assert "lab, Z80, 8 cores, 2026-11-24" in text
    assert environment["OMP_NUM_THREADS"] == threads
    assert environment["PLAIT_PIN"] == "1"
    assert "#SBATCH --cpus-per-task=4\n" in Path("launch/tiny-slurm/job.sbatch").read_text(encoding="utf-8")


def test_cores_are_asked_for(project: Path, monkeypatch):
    """Processes x measured threads: Kubernetes' request and limit, SkyPilot's CPUs, machines with two vCPUs a core."""
    measure(monkeypatch, 32, {1: 1.0, 32: 32.0})
    found = {}
    for engine, file in (("kubernetes", "job.yaml"), ("skypilot", "task.yaml"), ("azureml", "job.yaml"), ("sagemaker", "submit.py"), ("parallelcluster", "cluster.yaml")):  # fmt: skip
        assert run(["launch", "tiny.py:job", "--to", engine, "--plan", "dp=2", "--gpu-type", "cpu"]) == 0
        found[engine] = Path(f"launch/tiny-{engine}/{file}").read_text(encoding="utf-8")

    assert (
        "            requests:\n              cpu: '32'\n            limits:\n              cpu: '32'\n"
        in found["kubernetes"]
    )
    assert "cpus: 32+" in found["skypilot"]
    assert "--size Standard_D64s_v5" in found["azureml"]
    assert "ml.c7i.16xlarge" in found["sagemaker"]
    assert "InstanceType: c7i.16xlarge" in found["parallelcluster"]


@pytest.mark.parametrize("words", ["numactl --interleave=0,1", ""])
def test_one_process_over_numa_nodes_is_started_under_numactl(project: Path, words: str):
    """Where the node says that it is needed; without, torchrun starts bare."""
    assert run(["launch", "tiny.py:job", "--to", "torchrun", "--plan", "dp=1", "--gpu-type", "cpu"]) == 0
    executable(project / "bin" / "numactl", '#!/bin/sh\necho "numactl $1"\nshift\nexec "$@"\n')
    command, _ = asked(project, "torchrun", OMP_NUM_THREADS="1", FAKE_NUMACTL=words)

    assert command[: 2 if words else 1] == ([words, "-m"] if words else ["-m"])
