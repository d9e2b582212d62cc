"""The environments there are, and where they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plait.errors import RequestError

__all__ = ["COMMAND", "NAMES", "Environment", "every", "root", "wanted"]

COMMAND = "python -m plait.environments make"
"""What makes one, without its name."""

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """A virtual environment for what cannot be installed beside this one's torch, or should not be."""

    name: str
    purpose: str
    modules: tuple[str, ...]
    """What must import in it before it counts as made."""
    pythons: tuple[tuple[int, int], tuple[int, int]]
    """The lowest and the highest (major, minor) version of Python that its packages are published for."""
    variables: tuple[tuple[str, str], ...] = ()
    """Environment variables that its processes get."""

    @property
    def requirements(self) -> Path:
        """File of pinned versions that pip reads."""
        return _DATA / f"{self.name}.txt"

    @property
    def folder(self) -> Path:
        """Where it lies once made; another one as soon as the pinned versions change."""
        digest = hashlib.sha256(self.requirements.read_bytes()).hexdigest()[:12]
        return root() / f"{self.name}-{digest}"

    @property
    def python(self) -> Path:
        """Its interpreter; there only once it is made."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


_ALL = (
    Environment(
        name="litert",
        purpose="`plait export --to litert`",
        modules=("torch", "litert_torch", "ai_edge_litert.interpreter"),
        pythons=((3, 10), (3, 13)),
    ),
    Environment(
        name="tvm",
        purpose="`plait export --to tvm`",
        modules=("torch", "tvm.relax"),
        pythons=((3, 10), (3, 14)),
    ),
    Environment(
        name="tensorflow",
        purpose="SavedModel, .keras and .h5 files to ONNX",
        modules=("tensorflow", "tf2onnx"),
        pythons=((3, 10), (3, 13)),
        # Keras' backend is set for this process's sake, if at all.
        variables=(("TF_CPP_MIN_LOG_LEVEL", "3"), ("CUDA_VISIBLE_DEVICES", "-1"), ("KERAS_BACKEND", "tensorflow")),
    ),
    Environment(
        name="mxnet",
        purpose="MXNet's symbol and params files to ONNX",
        modules=("mxnet", "onnx"),
        pythons=((3, 8), (3, 11)),
    ),
    Environment(
        name="engines",
        purpose="the engines that read what `plait launch` writes, for the tests",
        modules=("sky", "azure.ai.ml", "azure.identity", "sagemaker.train"),
        pythons=((3, 10), (3, 13)),
        variables=(("SKYPILOT_DISABLE_USAGE_COLLECTION", "1"),),
    ),
    Environment(
        name="parallelcluster",
        purpose="AWS ParallelCluster's schema, for the tests",
        modules=("pkg_resources", "pcluster.schemas.cluster_schema"),
        pythons=((3, 10), (3, 12)),
        variables=(("AWS_DEFAULT_REGION", "us-east-1"),),
    ),
)

NAMES: tuple[str, ...] = tuple(one.name for one in _ALL)


def root() -> Path:
    """Folder of all environments: under PLAIT_CACHE, else XDG_CACHE_HOME, else ~/.cache."""
    base = Path(os.environ.get("PLAIT_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base.absolute() / "plait" / "environments"


def wanted(name: str) -> Environment:
    """The environment of that name.

    Raises:
        RequestError: there is none; says which there are.
    """
    for one in _ALL:
        if one.name == name:
            return one
    raise RequestError(f"environment {name!r}: there is no such one", hint=f"there are {', '.join(NAMES)}")


def every() -> Iterator[Environment]:
    """All of them, made or not."""
    yield from _ALL
