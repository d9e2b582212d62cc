"""GKE: a JobSet that takes one TPU slice."""

from __future__ import annotations

from typing import Any

from plait.jobs import pods
from plait.jobs.gcp_tpu import BACKEND, slice_type_of
from plait.jobs.kubernetes import KUBECTL
from plait.jobs.names import name_of
from plait.jobs.request import Engine, File, Job, Request, Submit
from plait.jobs.shell import Meeting, header
from plait.jobs.yaml_text import documents

__all__ = ["ENGINE"]


def _write(request: Request) -> Job:
    slice_type_of(request)
    part = request.part
    assert part is not None
    chips = request.nodes * request.devices_per_node
    meeting = Meeting(
        rank="$JOB_COMPLETION_INDEX",
        head=f"{request.name}-slice-0-0.{request.name}",
        note="JobSet names its pods JOBSET-slice-0-INDEX and gives them a headless service.",
    )
    notes = (
        "nodeSelector   one slice of the topology that holds all chips: every axis stays on its inter-chip links",
        "failurePolicy  a lost host ends the slice: the whole set is made again, and goes on from its newest checkpoint",
        "/runs          claim plait-runs, ReadWriteMany (Filestore, or Cloud Storage FUSE)",
    )
    text = documents(
        (header(request, "GKE TPUs (JobSet)", *notes), pods.config_map(request, meeting, "GKE TPUs")),
        ("", _job_set(request, name_of(part, "tpu-topology", chips) or "", name_of(part, "gke-label") or "")),
    )
    return Job(
        files=(File("jobset.yaml", text), pods.dockerfile(request), File("plan.yaml", request.plan.to_yaml())),
        submit=Submit(words=("kubectl", "apply", "-f", f"{request.folder}/jobset.yaml"), install=KUBECTL),
        notes=(BACKEND, *pods.notes_of(request)),
    )


def _job_set(request: Request, topology: str, label: str) -> dict[str, Any]:
    selector = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": topology}
    if request.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    template = pods.pod(request, containers=[pods.container(request)], nodeSelector=selector)
    job = {
        "completionMode": "Indexed",
        "completions": request.nodes,
        "parallelism": request.nodes,
        "backoffLimit": 0,
        "template": template,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": request.name,
            "labels": pods.labels(request),
            # One node pool, so one slice, for the set's one job.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": request.restarts},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": request.name},
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }


ENGINE = Engine(
    name="gke-jobset",
    says="a JobSet for TPUs in GKE",
    write=_write,
    aliases=("gke", "jobset"),
    sends_project=True,
    takes_spot=True,
)
