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

# Stands in for the interpreter: answers the question for this node's address, passes the device check, and prints
# the torchrun command, one word a line, then the environment.
PYTHON = """\
#!/bin/sh
case "$1 $2" in
    "-c "*getsockname*) echo 10.0.0.9; exit ;;
    "-c "*accelerator*) exit ;;
    "-m pip") exit ;;
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
