"""Kubeflow Trainer: a TrainJob on the ClusterTrainingRuntime torch-distributed."""

from __future__ import annotations

from typing import Any

from plait.jobs import pods
from plait.jobs.kubernetes import KUBECTL
from plait.jobs.request import Engine, File, Job, Request, Submit
from plait.jobs.shell import Meeting, header
from plait.jobs.yaml_text import documents

__all__ = ["ENGINE"]

_MEETING = Meeting(
    rank="$PET_NODE_RANK",
    head="$PET_MASTER_ADDR",
    port="$PET_MASTER_PORT",
    note="The Trainer sets PET_... in every node's container.",
)
# torchrun would read the same names as its own options; this script passes them itself.
_BEFORE = "unset PET_NNODES PET_NPROC_PER_NODE"


def _train_job(request: Request) -> dict[str, Any]:
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": request.name, "labels": pods.labels(request)},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {
                "image": pods.image_of(request),
                "command": ["bash", f"{pods.SCRIPTS}/node.sh"],
                "numNodes": request.nodes,
                "numProcPerNode": request.devices_per_node,
                "env": pods.environment(request),
                "resourcesPerNode": pods.resources(request),
            },
            "runtimePatches": [{"manager": "plait.launch/cli", "trainingRuntimeSpec": _patch(request)}],
        },
    }


def _patch(request: Request) -> dict[str, Any]:
    """The volumes of the runtime's pods: job and container of torch-distributed are both called node."""
    pod_spec = {
        "volumes": pods.volumes(request),
        "containers": [{"name": "node", "volumeMounts": pods.mounts()}],
    }
    return {
        "template": {
            "spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {"spec": pod_spec}}}}]}
        }
    }


_NOTES = (
    "runtimeRef      torch-distributed comes with Kubeflow Trainer 2; it makes a JobSet with a pod for each node",
    "trainer         one pod takes a node's devices, so tp and the other fast axes stay inside it",
    "runtimePatches  adds the volumes: scripts, checkpoints (claim plait-runs, ReadWriteMany), shared memory",
    "Restarts        processes by torchrun in node.sh; pods by the runtime's own JobSet failure policy",
)


def _write(request: Request) -> Job:
    text = documents(
        (
            header(request, "Kubeflow Trainer", *_NOTES),
            pods.config_map(request, _MEETING, "Kubeflow Trainer", before=_BEFORE),
        ),
        ("", _train_job(request)),
    )
    return Job(
        files=(File("trainjob.yaml", text), pods.dockerfile(request), File("plan.yaml", request.plan.to_yaml())),
        submit=Submit(words=("kubectl", "apply", "-f", f"{request.folder}/trainjob.yaml"), install=KUBECTL),
        notes=pods.notes_of(request),
    )


ENGINE = Engine(
    name="kubeflow",
    says="a TrainJob for Kubeflow Trainer 2",
    write=_write,
    aliases=("trainjob", "kubeflow-trainer"),
    sends_project=True,
)
