"""What Kubernetes, Kubeflow and GKE have in common: the pod of a node, its files, its image."""

from __future__ import annotations

import shlex
from typing import Any

from plait.jobs.names import resource_of
from plait.jobs.request import File, Request
from plait.jobs.shell import PACKAGE, Meeting, header, node_script, static_environment

__all__ = ["SCRIPTS", "config_map", "container", "dockerfile", "image_of", "notes_of", "pod", "run_dir_of", "volumes"]

SCRIPTS = "/etc/plait"
"""Where the ConfigMap with node.sh and plan.yaml is mounted."""
CLAIM = "plait-runs"
"""PersistentVolumeClaim (ReadWriteMany) for logs and checkpoints."""


def run_dir_of(request: Request) -> str:
    """On the claim, unless something else was asked for."""
    return request.run_dir or f"/runs/{request.name}"


def image_of(request: Request) -> str:
    """The image asked for, else the name that the Dockerfile's comment builds."""
    return request.image or f"plait-{request.name}:latest"


def notes_of(request: Request) -> tuple[str, ...]:
    """What is left to do by hand."""
    notes = [
        f"a PersistentVolumeClaim {CLAIM} (ReadWriteMany) must exist in the namespace: logs and checkpoints go there"
    ]
    if request.cpu_only:
        notes.append(
            f"{request.cores} CPUs for each pod; add a memory request = limit for cores of its own (static CPU manager)"
        )
    if not request.image:
        notes.append(f"build and push the image of the Dockerfile, then pass --image (now {image_of(request)})")
    return tuple(notes)


def config_map(request: Request, meeting: Meeting, engine: str, before: str = "") -> dict[str, Any]:
    """node.sh and plan.yaml, so that they can be read and changed without building an image."""
    script = node_script(
        request, meeting, engine=engine, plan=f"{SCRIPTS}/plan.yaml", run_dir=run_dir_of(request), before=before
    )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": request.name, "labels": labels(request)},
        "data": {"node.sh": script, "plan.yaml": request.plan.to_yaml()},
    }


def labels(request: Request) -> dict[str, str]:
    """By which everything of the job is found."""
    return {"app.kubernetes.io/name": request.name, "app.kubernetes.io/managed-by": "plait"}


def volumes(request: Request) -> list[dict[str, Any]]:
    """Scripts, checkpoints, and shared memory: the 64 MiB of a container are too few for NCCL and data loaders."""
    return [
        {"name": "scripts", "configMap": {"name": request.name}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": CLAIM}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]


def mounts() -> list[dict[str, Any]]:
    """Where the volumes are seen."""
    return [
        {"name": "scripts", "mountPath": SCRIPTS, "readOnly": True},
        {"name": "runs", "mountPath": "/runs"},
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - shared memory of the container, not of this machine
    ]


def resources(request: Request) -> dict[str, Any]:
    """The node's devices: all that one pod asks for lies in one node, which is what keeps the fast axes there."""
    if request.part is None:
        # Whole CPUs, limit = request: with a memory limit beside, a kubelet with the static CPU policy gives cores of its own.
        cpus = {"cpu": str(request.cores)}
        return {"requests": cpus, "limits": cpus} if request.cpu_only else {"requests": cpus}
    return {"limits": {resource_of(request.part): request.devices_per_node}}


def environment(request: Request) -> list[dict[str, Any]]:
    """Static variables, also in node.sh; here they can be changed by a tool that edits the YAML."""
    return [{"name": name, "value": value} for name, value in static_environment(request).items()]


def container(request: Request, **more: Any) -> dict[str, Any]:
    """The one container of a node's pod."""
    return {
        "name": "node",
        "image": image_of(request),
        "command": ["bash", f"{SCRIPTS}/node.sh"],
        "env": environment(request),
        "resources": resources(request),
        "volumeMounts": mounts(),
        **more,
    }


def pod(request: Request, *, containers: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A pod template for one node."""
    spec: dict[str, Any] = {"restartPolicy": "Never", **more, "containers": containers, "volumes": volumes(request)}
    return {"metadata": {"labels": labels(request)}, "spec": spec}


def dockerfile(request: Request) -> File:
    """An image with the project, plait and torch."""
    vendor = request.part.vendor if request.part is not None else "none"
    base = "ARG BASE=python:3.11-slim"
    why = "# torch's wheel brings CUDA's libraries; the node needs only the driver."
    if vendor not in ("NVIDIA", "none"):
        base = "ARG BASE"
        why = f"# --build-arg BASE=IMAGE: one of {vendor} that holds torch 2.13 for {request.part_name}."
    text = f"""\
{header(request, "a container")}
# From the project's folder, with plait's wheel beside (in plait's own folder: pip wheel --no-deps -w PROJECT .):
#   docker build -f {shlex.quote(request.folder)}/Dockerfile -t {image_of(request)} . && docker push {image_of(request)}
{why}
{base}
FROM ${{BASE}}
WORKDIR /workspace
COPY {PACKAGE} /tmp/
RUN pip install --no-cache-dir "/tmp/{PACKAGE}[hf]"
# The project, so that TARGET is found relative to /workspace.
COPY . .
"""
    return File("Dockerfile", text)
