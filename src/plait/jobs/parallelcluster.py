"""AWS ParallelCluster: the cluster's description, and Slurm's files for it."""

from __future__ import annotations

import shlex
from typing import Any

from plait.jobs.names import cpu_machine, need_name
from plait.jobs.request import Engine, File, Job, Request, Submit
from plait.jobs.shell import header
from plait.jobs.slurm import slurm_files
from plait.jobs.yaml_text import documents

__all__ = ["ENGINE"]

# Types with Elastic Fabric Adapter, by the start of their names. Source: AWS EC2 user guide, "Supported instance types".
_WITH_EFA = ("p4d.", "p4de.", "p5.48", "p5e.", "p5en.", "p6-", "trn1.32", "trn1n.", "g5.48", "g6.48", "g6e.48", "dl1.")
_EFA = """\
# Elastic Fabric Adapter carries NCCL between nodes through libfabric (its plugin is in the Deep Learning AMIs).
export FI_PROVIDER="${FI_PROVIDER:-efa}"
"""


def _write(request: Request) -> Job:
    if request.part is None:
        instance = cpu_machine(request, "aws")
    else:
        instance = need_name(
            request, "aws", request.devices_per_node, "put its instance type into cluster.yaml by hand"
        )
    has_efa = request.nodes > 1 and instance.startswith(_WITH_EFA)
    note = (
        "Make the cluster:   pcluster create-cluster --cluster-name plait --cluster-configuration cluster.yaml",
        f"Then on its head node, in /shared with the project: sbatch {shlex.quote(request.folder)}/job.sbatch",
        "Fill in the region, subnets and key.",
    )
    cluster = documents((header(request, "AWS ParallelCluster", *note), _cluster(request, instance, has_efa)))
    files = slurm_files(
        request,
        "AWS ParallelCluster (Slurm)",
        before=_EFA if has_efa else "",
        directives=("#SBATCH --partition=plait",),
    )
    return Job(
        files=(*files, File("cluster.yaml", cluster)),
        submit=Submit(
            words=("sbatch", f"{request.folder}/job.sbatch"),
            install="sbatch is on the cluster's head node: make the cluster with `pcluster create-cluster` (pip install "
            "aws-parallelcluster), log in with `pcluster ssh`",
        ),
        notes=("fill in region, subnets and key in cluster.yaml",),
    )


def _cluster(request: Request, instance: str, has_efa: bool) -> dict[str, Any]:
    resource: dict[str, Any] = {
        "Name": "nodes",
        "Instances": [{"InstanceType": instance}],
        "MinCount": 0,
        "MaxCount": request.nodes,
    }
    networking: dict[str, Any] = {"SubnetIds": ["subnet-REPLACE"]}
    if request.part is None:
        # A thread of plait's has a core to itself.
        resource["DisableSimultaneousMultithreading"] = True
    if request.nodes > 1:
        # Close together, and on the fast network where the machine has it.
        networking["PlacementGroup"] = {"Enabled": True}
        if has_efa:
            resource["Efa"] = {"Enabled": True}
    return {
        "Region": "REGION",
        "Image": {"Os": "ubuntu2204"},
        "HeadNode": {
            "InstanceType": "m7i.xlarge",
            "Networking": {"SubnetId": "subnet-REPLACE"},
            "Ssh": {"KeyName": "KEY"},
        },
        "Scheduling": {
            "Scheduler": "slurm",
            "SlurmQueues": [
                {
                    "Name": "plait",
                    "CapacityType": "SPOT" if request.spot else "ONDEMAND",
                    "ComputeResources": [resource],
                    "Networking": networking,
                }
            ],
        },
        # All nodes see it: project, logs and checkpoints.
        "SharedStorage": [
            {
                "Name": "shared",
                "MountDir": "/shared",
                "StorageType": "FsxLustre",
                "FsxLustreSettings": {"StorageCapacity": 1200, "DeploymentType": "SCRATCH_2"},
            }
        ],
    }


ENGINE = Engine(
    name="parallelcluster",
    says="an AWS ParallelCluster with Slurm",
    write=_write,
    aliases=("aws-parallelcluster", "pcluster"),
    takes_spot=True,
)
