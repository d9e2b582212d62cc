"""Every file passes its engine's own schema or parser.

Kubernetes' and Kubeflow's models are small and in the test dependencies. The others are heavy and live in environments of
their own, which are used when they are there:

    make engines
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.cli.main import run
from plait.environments.names import every

# engine -> (checker, module that it needs, file)
ENGINES = {
    "kubernetes": ("kubernetes", "kubeflow_trainer_api", "job.yaml"),
    "kubeflow": ("kubernetes", "kubeflow_trainer_api", "trainjob.yaml"),
    "gke-jobset": ("kubernetes", "kubeflow_trainer_api", "jobset.yaml"),
    "skypilot": ("skypilot", "sky", "task.yaml"),
    "azureml": ("azureml", "azure.ai.ml", "job.yaml"),
    "sagemaker": ("sagemaker", "sagemaker.train", "submit.py"),
    "parallelcluster": ("parallelcluster", "pcluster", "cluster.yaml"),
}
VARIANTS = {
    "two nodes": ["--plan", "dp=2,tp=4,pp=2"],
    "one node, spot": ["--plan", "fsdp=8", "--spot", "--image", "registry.local/it:1", "--steps", "10"],
    "on CPUs": ["--plan", "dp=2", "--gpu-type", "cpu"],
}


@functools.cache
def interpreter(module: str) -> str | None:
    """A Python that has `module`: this one, one that `make engines` made, or one of PLAIT_ENGINES_PYTHON."""
    top = module.split(".", maxsplit=1)[0]
    if importlib.util.find_spec(top) is not None:
        return sys.executable
    pythons = [*MADE, *filter(None, os.environ.get("PLAIT_ENGINES_PYTHON", "").split(os.pathsep))]
    for python in pythons:
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({top!r}) is None)"
        if subprocess.run([python, "-c", code], timeout=60, check=False).returncode == 0:
            return python
    return None


def made() -> list[str]:
    """Looked up before a test changes where caches lie."""
    return [str(one.python) for one in every() if one.name in ("engines", "parallelcluster") and one.python.exists()]


MADE = made()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_accepts_its_file(project: Path, monkeypatch, engine: str, variant: str):
    """On two nodes, on one with everything that is optional, and without accelerators."""
    checker, module, file = ENGINES[engine]
    python = interpreter(module)
    if python is None:
        pytest.skip(f"{module} is not installed: `make engines`")
    words = VARIANTS[variant]
    if engine == "gke-jobset":
        if variant == "on CPUs":
            pytest.skip("a TPU slice is what this engine is for")
        words = [*words[2:], "--plan", "dp=8"]
    part = [] if "--gpu-type" in words else ["--gpu-type", "TPU-v5e" if engine == "gke-jobset" else "H100"]
    assert run(["launch", "tiny.py:job", "--to", engine, *part, *words]) == 0
    home = project / "home"
    home.mkdir()
    done = subprocess.run(
        [python, Path(__file__).with_name("validators.py"), checker, Path("launch") / f"tiny-{engine}" / file],
        env={**os.environ, "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("engine", ["kubernetes", "kubeflow"])
def test_the_validator_would_see_a_mistake(project: Path, engine: str):
    """A key that the schema does not know is refused, so that acceptance means something."""
    checker, module, file = ENGINES[engine]
    python = interpreter(module)
    if python is None:
        pytest.skip(f"{module} is not installed: `make engines`")
    assert run(["launch", "tiny.py:job", "--to", engine, "--plan", "dp=16", "--gpu-type", "H100"]) == 0
    path = Path("launch") / f"tiny-{engine}" / file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("completionMode", "completionMood").replace("numNodes", "numNode"), encoding="utf-8")
    done = subprocess.run(
        [python, Path(__file__).with_name("validators.py"), checker, path],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert "not known to its schema" in done.stderr
