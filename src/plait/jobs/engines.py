"""Every engine by name."""

from __future__ import annotations

from plait.capture.arguments import nearest
from plait.errors import RequestError
from plait.jobs import (
    azureml,
    gcp_tpu,
    gke_jobset,
    kubeflow,
    kubernetes,
    parallelcluster,
    sagemaker,
    skypilot,
    slurm,
    torchrun,
)
from plait.jobs.request import Engine

__all__ = ["ENGINES", "engine_called"]

_MODULES = (
    torchrun, slurm, kubernetes, kubeflow, skypilot, azureml, gcp_tpu, gke_jobset, sagemaker, parallelcluster,
)  # fmt: skip
ENGINES: dict[str, Engine] = {module.ENGINE.name: module.ENGINE for module in _MODULES}


def engine_called(name: str) -> Engine:
    """The engine of that name or alias.

    Raises:
        RequestError: there is none; the nearest is offered.
    """
    words = {word: engine for engine in ENGINES.values() for word in (engine.name, *engine.aliases)}
    found = words.get(name.strip().lower().replace("_", "-"))
    if found is None:
        raise RequestError(
            f"launch: no engine {name!r}{nearest(name.lower(), words)}", hint=f"--to takes {', '.join(ENGINES)}"
        )
    return found
