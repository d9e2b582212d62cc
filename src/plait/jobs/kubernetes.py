"""Plain Kubernetes: an Indexed Job, one pod for each node, and a headless Service that gives the pods names."""

from __future__ import annotations

from typing import Any

from plait.jobs import pods
from plait.jobs.request import Engine, File, Job, Request, Submit
from plait.jobs.shell import Meeting, header
from plait.jobs.yaml_text import documents

__all__ = ["ENGINE", "KUBECTL"]

KUBECTL = "install kubectl and point it at the cluster (kubectl config current-context)"


def _meeting(request: Request) -> Meeting:
    return Meeting(
        rank="$JOB_COMPLETION_INDEX",
        head=f"{request.name}-0.{request.name}",
        note="The Indexed Job numbers its pods; the headless Service gives pod 0 its name.",
    )


def _service(request: Request) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": request.name, "labels": pods.labels(request)},
        "spec": {
            "clusterIP": "None",
            # Pods look for each other before any of them is ready.
            "publishNotReadyAddresses": True,
            "selector": pods.labels(request),
            "ports": [{"name": "rendezvous", "port": 29400}],
        },
    }


def _job(request: Request) -> dict[str, Any]:
    template = pods.pod(request, containers=[pods.container(request)], subdomain=request.name)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": request.name, "labels": pods.labels(request)},
        "spec": {
            "completionMode": "Indexed",
            "completions": request.nodes,
            "parallelism": request.nodes,
            "backoffLimit": request.restarts * request.nodes,
            "podFailurePolicy": {
                "rules": [
                    # A pod that was evicted or preempted does not count.
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": template,
        },
    }


_NOTES = (
    "One pod takes a node's devices, so tp and the other fast axes stay inside it.",
    "Service      clusterIP None gives pods their names, also before they are ready",
    "Job          Indexed: pod i is node i. backoffLimit counts pods that failed; evicted ones are free of charge",
    "/runs        claim plait-runs, ReadWriteMany: logs and checkpoints; a new pod goes on from the newest",
    "shm          in memory: NCCL and data loaders need more than a container's usual 64 MiB",
    "For racks: with Kueue, annotate the template kueue.x-k8s.io/podset-preferred-topology: <your rack label>.",
)


def _write(request: Request) -> Job:
    text = documents(
        (header(request, "Kubernetes", *_NOTES), pods.config_map(request, _meeting(request), "Kubernetes")),
        ("", _service(request)),
        ("", _job(request)),
    )
    return Job(
        files=(File("job.yaml", text), pods.dockerfile(request), File("plan.yaml", request.plan.to_yaml())),
        submit=Submit(words=("kubectl", "apply", "-f", f"{request.folder}/job.yaml"), install=KUBECTL),
        notes=pods.notes_of(request),
    )


ENGINE = Engine(
    name="kubernetes", says="an Indexed Job with a headless Service", write=_write, aliases=("k8s",), sends_project=True
)
