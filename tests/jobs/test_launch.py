"""`plait launch`: what is written, what is refused, what is started."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from plait.cli.main import run
from plait.jobs.engines import ENGINES
from plait.schema import Plan

PART = {"gcp-tpu": "TPU-v5e", "gke-jobset": "TPU-v5e"}


def words(engine: str, *more: str, plan: str = "dp=2,tp=4,pp=2") -> list[str]:
    """A launch of tiny.py for an engine, on 2 nodes of 8 (TPUs: 4 of 4)."""
    shape = ["--nodes", "4"] if engine in PART else ["--nodes", "2"]
    return [
        "launch",
        "tiny.py:job",
        "--plan",
        plan,
        "--to",
        engine,
        "--gpu-type",
        PART.get(engine, "H100"),
        *shape,
        *more,
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_files_are_complete(project: Path, capsys, engine: str):
    """Every file opens with what it is and where ranks land; the plan is there whole; the JSON names all of it."""
    assert run([*words(engine), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    texts = {path: Path(path).read_text(encoding="utf-8") for path in result["files"]}

    assert result["engine"] == engine
    assert not result["submitted"]
    assert [(a["axis"], a["inside_node"]) for a in result["placement"]] == [
        ("tp", True), ("dp", engine not in PART), ("pp", False),
    ]  # fmt: skip
    for path, text in texts.items():
        if not path.endswith(("plan.yaml", "conda.yaml")):
            assert "# Where ranks land" in text, path
            assert "dp=2,tp=4,pp=2" in text, path
    assert Plan.load(next(path for path in texts if path.endswith("plan.yaml"))) == Plan.parse("dp=2,tp=4,pp=2")


@pytest.mark.parametrize("engine", ENGINES)
def test_shell_files_parse(project: Path, engine: str):
    """`bash -n` accepts every script, and python every Python file."""
    assert run(words(engine, "--spot", "--steps", "5", "--image", "registry.local/it:1")) == 0
    folder = Path("launch") / f"tiny-{engine}"
    for path in folder.iterdir():
        if path.suffix in (".sh", ".sbatch"):
            subprocess.run(["bash", "-n", path], check=True, timeout=20)
        if path.suffix == ".py":
            compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_nothing_is_started(project: Path, capsys):
    """Without --submit the last line says how to."""
    assert run(words("slurm")) == 0

    assert capsys.readouterr().out.endswith("nothing was started; to start it: sbatch launch/tiny-slurm/job.sbatch\n")


def test_options_reach_train(project: Path):
    """In the words of `plait train`, quoted for the shell; --resume always."""
    more = (
        "--steps",
        "7",
        "--batch",
        "32",
        "--seed",
        "3",
        "--run-dir",
        "out/it",
        "--name",
        "My Job_1",
        "--data",
        "a b.txt",
    )
    assert run([*words("slurm", *more)]) == 0
    text = Path("launch/my-job-1-slurm/node.sh").read_text(encoding="utf-8")

    assert (
        "-m plait train tiny.py:job --plan \"$PLAIT_JOB/plan.yaml\" --steps 7 --batch 32 --seed 3 --data 'a b.txt' "
        '--checkpoint-minutes 10 --run-dir "out/it" --resume'
    ) in text


def test_the_accelerator_of_a_plan_file(project: Path, capsys):
    """`plait plan -o` wrote which cluster the plan is for; `launch` asks for its parts."""
    Path("plan.yaml").write_text("target: tiny.py:job\ncluster: 4xA100-SXM-80GB\nplan:\n  dp: 4\n", encoding="utf-8")

    assert run(["launch", "tiny.py:job", "--plan", "plan.yaml", "--to", "sky", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accelerator"] == "NVIDIA A100 SXM4 80GB"
    assert "A100-80GB: 4" in Path("launch/tiny-skypilot/task.yaml").read_text(encoding="utf-8")


def test_files_that_were_changed_are_kept(project: Path, capsys):
    """Writing again is fine, writing over somebody's changes needs --force."""
    assert run(words("slurm")) == 0
    assert run(words("slurm")) == 0
    path = Path("launch/tiny-slurm/job.sbatch")
    path.write_text(path.read_text(encoding="utf-8") + "# mine\n", encoding="utf-8")

    assert run(words("slurm")) == 2
    assert "is there already and differs" in capsys.readouterr().err
    assert "# mine" in path.read_text(encoding="utf-8")
    assert run(words("slurm", "--force")) == 0
    assert "# mine" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "message", "hint"),
    [
        (("--to", "slrum"), "launch: no engine 'slrum'; did you mean 'slurm'?", "--to takes torchrun, slurm"),
        (("--to", "xyzzy"), "launch: no engine 'xyzzy'", "parallelcluster"),
        (("--plan", "dp=3"), "launch: the plan dp=3 needs 3 devices, 2 nodes of 2 are 4", "--devices-per-node"),
        (("--plan", "tp=16"), "launch: tp=16 would cross nodes of 8 devices", "--tp-across-nodes"),
        (("--plan", "absent.yaml"), "plan file absent.yaml: [Errno 2] No such file", ""),
        (("--plan", "dp=two"), "plan: dp=two is not a whole number", ""),
        (("--plan", "dp=8,cp=2"), "launch: plait cannot run this plan: cp=2", "--runnable"),
        (("--gpu-type", "H1000"), "accelerator 'H1000' is not in the catalogue", "NVIDIA H100"),
        (("--gpu-type", "Inferentia1"), "launch: AWS Inferentia1 cannot train", "--trains"),
        (("--batch", "1"), "plan: a batch of 1 is smaller", "--batch"),
        (("-o", "."), "launch: the job's files need a folder of their own", "-o"),
        (("--to", "azureml", "-o", "/elsewhere"), "launch: azureml sends the working directory along", "-o"),
        (("-o", "-x"), "launch: --output '-x' holds a character", ""),
        (("--run-dir", "runs/$(id)"), "launch: --run-dir 'runs/$(id)' holds a character", ""),
        (("--run-dir", 'a"b'), "launch: --run-dir 'a\"b' holds a character", ""),
        (("--run-dir", "a`id`"), "launch: --run-dir 'a`id`' holds a character", ""),
        (("--run-dir", "a\nb"), "launch: --run-dir 'a\\nb' holds a character", ""),
        (("--data", "a\nb"), "launch: --data 'a\\nb' holds a character that cannot be printed", ""),
        (("--to", "torchrun", "--hosts", "a,-oProxyCommand"), "launch: --hosts 'a,-oProxyCommand' holds", ""),
        (("--name", "!!!"), "launch: '!!!' makes no name for a job", "--name"),
        (("--to", "torchrun", "--hosts", "a,b,c"), "launch: --hosts names 3 hosts, the job has 2 nodes", ""),
        (("--interface", "eth0; id"), "launch: --interface 'eth0; id' holds a character", ""),
        (("--image", "a$(id)"), "launch: --image 'a$(id)' holds a character", ""),
        (("--to", "gcp-tpu"), "launch: Google Cloud TPU needs a TPU", "TPU-v5e"),
        (("--to", "aws", "--plan", "dp=6"), "launch: AWS has no machine with 3 NVIDIA H100 SXM5", "p5.48xlarge"),
    ],
)
def test_refused_requests(project: Path, capsys, more: tuple[str, ...], message: str, hint: str):
    """Status 2, a first line with what and where, then what to change; nothing is written."""
    given = dict(zip(more[::2], more[1::2], strict=True))
    asked = {"--plan": "dp=16", "--to": "slurm", "--gpu-type": "H100", "--nodes": "2", **given}

    assert run(["launch", "tiny.py:job", *(word for pair in asked.items() for word in pair)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert hint in err
    assert "Traceback" not in err
    assert not Path("launch").exists()


def test_a_target_that_is_not_there(project: Path, capsys):
    """Neither written nor started."""
    assert run(["launch", "absent.py:job", "--plan", "dp=2", "--to", "slurm"]) == 2
    assert capsys.readouterr().err.startswith("error: target absent.py: no such file")
    assert not Path("launch").exists()


def test_hosts_of_a_slice_have_four_chips(project: Path, capsys):
    """Other shapes are refused with the right one."""
    asked = ["launch", "tiny.py:job", "--plan", "dp=16", "--to", "gcp-tpu", "--gpu-type", "TPU-v5e", "--nodes", "2"]

    assert run(asked) == 2
    assert "--devices-per-node 4 --nodes 4" in capsys.readouterr().err


def made_for(**more: str) -> list[str]:
    """A launch of a plan file that `plait plan -o` would have written."""
    lines = [f"{name}: {value}" for name, value in {"target": "tiny.py:job", **more}.items()]
    Path("plan.yaml").write_text("\n".join([*lines, "plan:", "  dp: 2"]) + "\n", encoding="utf-8")
    return ["launch", "tiny.py:job", "--plan", "plan.yaml", "--to", "slurm", "--json"]


@pytest.mark.parametrize(
    ("file", "more", "note"),
    [
        ({"cluster": "2xH100-SXM"}, ("--gpu-type", "A100"), "was made for 2xH100-SXM"),
        ({"cluster": "2xcpu"}, ("--gpu-type", "A100"), "was made for 2xcpu"),
        ({"cluster": "2xH100-SXM"}, ("--gpu-type", "cpu"), "was made for 2xH100-SXM"),
        ({"cluster": "lab"}, (), "was made for the cluster lab"),
        ({"target": "other.py:job"}, (), "was made for the target other.py:job"),
        ({"cluster": "2xH100-SXM"}, ("--spot",), "--spot changes nothing here"),
    ],
)
def test_a_plan_for_something_else_is_said(
    project: Path, capsys, file: dict[str, str], more: tuple[str, ...], note: str
):
    """It is written all the same: the plan may do."""
    assert run([*made_for(**file), *more]) == 0
    assert note in " ".join(json.loads(capsys.readouterr().out)["notes"])


@pytest.mark.parametrize("more", [(), ("--gpu-type", "H100-SXM")])
def test_a_plan_for_what_is_launched_needs_no_note(project: Path, capsys, more: tuple[str, ...]):
    """Under any of the part's names."""
    assert run([*made_for(cluster="2xH100"), *more]) == 0
    assert "was made for" not in " ".join(json.loads(capsys.readouterr().out)["notes"])


def test_a_plan_for_processes_is_for_the_cpu(project: Path):
    """`plait plan --cluster 2xcpu -o`: the job keeps off accelerators."""
    assert run(made_for(cluster="2xcpu")) == 0
    assert 'PLAIT_DEVICE="${PLAIT_DEVICE:-cpu}"' in Path("launch/tiny-slurm/node.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["plan: [1]\n", "- 1\n", "plan:\n  dp: two\n", "plan:\n  dq: 2\n", "\x00", "a: [\n"])
def test_a_broken_plan_file(project: Path, capsys, text: str):
    """Status 2 and a short message, whatever it holds."""
    Path("plan.yaml").write_text(text, encoding="utf-8")

    assert run(["launch", "tiny.py:job", "--plan", "plan.yaml", "--to", "slurm"]) == 2
    assert capsys.readouterr().err.startswith("error: plan file plan.yaml: ")
    assert not Path("launch").exists()


@pytest.mark.parametrize("engine", ["kubernetes", "kubeflow", "skypilot", "azureml", "sagemaker"])
def test_a_target_that_nodes_do_not_get(project: Path, capsys, engine: str, tmp_path_factory):
    """They get a copy of the working directory; a file outside is not in it."""
    outside = tmp_path_factory.mktemp("elsewhere") / "tiny.py"
    outside.write_text((project / "tiny.py").read_text(encoding="utf-8"), encoding="utf-8")

    assert run(["launch", f"{outside}:job", "--plan", "dp=2", "--to", engine, "--gpu-type", "cpu"]) == 2
    assert "it lies outside the working directory" in capsys.readouterr().err


# -- --submit


def fake(folder: Path, name: str, status: int = 0) -> None:
    """A command that writes down what it was asked."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$(basename $0) $*" > asked.txt\necho chatter\nexit {status}\n', encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("engine", "program", "asked"),
    [
        ("slurm", "sbatch", "sbatch launch/tiny-slurm/job.sbatch"),
        ("kubernetes", "kubectl", "kubectl apply -f launch/tiny-kubernetes/job.yaml"),
        ("kubeflow", "kubectl", "kubectl apply -f launch/tiny-kubeflow/trainjob.yaml"),
        ("skypilot", "sky", "sky jobs launch --yes launch/tiny-skypilot/task.yaml"),
        ("azureml", "az", "az ml job create --file launch/tiny-azureml/job.yaml"),
    ],
)
def test_submit_calls_the_engines_own_command(
    project: Path, capsys, monkeypatch, engine: str, program: str, asked: str
):
    """From the project's folder; what it prints is kept off stdout."""
    (project / "bin").mkdir()
    fake(project / "bin", program)
    monkeypatch.setenv("PATH", f"{project}/bin:/usr/bin:/bin")

    assert run([*words(engine), "--submit", "--json"]) == 0
    assert (project / "asked.txt").read_text(encoding="utf-8").strip() == asked
    assert json.loads(capsys.readouterr().out)["submitted"]


def test_a_refused_job_is_1(project: Path, capsys, monkeypatch):
    """The engine's status is told."""
    (project / "bin").mkdir()
    fake(project / "bin", "sbatch", status=3)
    monkeypatch.setenv("PATH", f"{project}/bin:/usr/bin:/bin")

    assert run([*words("slurm"), "--submit"]) == 1
    assert "`sbatch launch/tiny-slurm/job.sbatch` ended with status 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine", "missing", "hint"),
    [
        ("slurm", "sbatch", "login node"),
        ("kubernetes", "kubectl", "install kubectl"),
        ("skypilot", "sky", "pip install 'skypilot"),
        ("azureml", "az", "az extension add --name ml"),
        ("gcp-tpu", "gcloud", "Google Cloud's CLI"),
        ("sagemaker", "sagemaker.train", "pip install sagemaker-train"),
        ("parallelcluster", "sbatch", "pcluster create-cluster"),
    ],
)
def test_an_engine_that_is_not_installed(project: Path, capsys, monkeypatch, engine: str, missing: str, hint: str):
    """Status 2, what to install, and the command for later; the files are there."""
    (project / "bin").mkdir()
    (project / "bin" / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(project / "bin"))

    assert run([*words(engine), "--submit"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: launch: {missing} is not installed here, so the job was not started")
    assert hint in err
    assert (Path("launch") / f"tiny-{engine}" / "plan.yaml").is_file()


def test_a_zone_that_is_not_set_is_asked_for(project: Path, capsys, monkeypatch):
    """Status 2 before anything is started, the files written, the command with the variable in the hint."""
    (project / "bin").mkdir()
    fake(project / "bin", "gcloud")
    monkeypatch.setenv("PATH", f"{project}/bin:/usr/bin:/bin")
    monkeypatch.delenv("ZONE", raising=False)

    assert run([*words("gcp-tpu"), "--submit"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: launch: ZONE is not set, so the job was not started (its files are written)")
    assert "ZONE=... bash launch/tiny-gcp-tpu/queue.sh" in err


def test_what_is_to_be_typed_is_quoted(project: Path, capsys):
    """A folder with a space in it makes one word of the command, in the text and in the file's own comment."""
    assert run([*words("slurm"), "-o", "my jobs/one"]) == 0

    assert "to start it: sbatch 'my jobs/one/job.sbatch'" in capsys.readouterr().out
    assert "sbatch 'my jobs/one'/job.sbatch" in Path("my jobs/one/job.sbatch").read_text(encoding="utf-8")


def test_a_volta_needs_another_torch(project: Path, capsys):
    """The default build has no kernels for it, and says so too late."""
    assert run(["launch", "tiny.py:job", "--plan", "dp=2", "--to", "slurm", "--gpu-type", "V100"]) == 0
    assert "CUDA 12.6" in capsys.readouterr().out

    assert run(["launch", "tiny.py:job", "--plan", "dp=2", "--to", "slurm", "--gpu-type", "NVIDIA K80"]) == 2
    assert "no build for Kepler" in capsys.readouterr().err


def test_torchrun_over_unknown_hosts_is_not_started(project: Path, capsys, monkeypatch):
    """--hosts is asked for."""
    (project / "bin").mkdir()
    fake(project / "bin", "ssh")
    monkeypatch.setenv("PATH", f"{project}/bin:/usr/bin:/bin")

    assert run([*words("torchrun"), "--submit"]) == 2
    assert "pass --hosts" in capsys.readouterr().err


def test_torchrun_over_ssh(project: Path, monkeypatch):
    """start.sh asks each host for its part of the run."""
    (project / "bin").mkdir()
    ssh = project / "bin" / "ssh"
    ssh.write_text('#!/bin/sh\nfor last; do :; done\necho "$5 $last" >> asked.txt\n', encoding="utf-8")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{project}/bin:/usr/bin:/bin")

    assert run([*words("torchrun"), "--hosts", "me@one,two", "--submit"]) == 0
    asked = sorted((project / "asked.txt").read_text(encoding="utf-8").splitlines())
    assert [line.split(" PYTHON")[0] for line in asked] == [
        "me@one NODE_RANK=0 MASTER_ADDR=one",
        "two NODE_RANK=1 MASTER_ADDR=one",
    ]
