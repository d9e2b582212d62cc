"""Azure Machine Learning: a command job."""

from __future__ import annotations

import shlex
from typing import Any

from plait.jobs.names import cpu_machine, need_name
from plait.jobs.request import Engine, File, Job, Request, Submit
from plait.jobs.shell import PACKAGE, Meeting, header, node_script, static_environment
from plait.jobs.yaml_text import documents

__all__ = ["ENGINE"]

_MEETING = Meeting(
    rank="$NODE_RANK",
    head="$MASTER_ADDR",
    port="$MASTER_PORT",
    note="Azure ML sets them in every node, because the job's distribution is pytorch.",
)
_BASE = "mcr.microsoft.com/azureml/openmpi5.0-cuda12.4-ubuntu22.04"  # Azure ML's own GPU base image
_STORE = "azureml://datastores/workspaceblobstore"  # every workspace has it
_NOTES = (
    "code          the project's folder, sent along; TARGET is relative to it",
    "distribution  one process in each node: torchrun, which starts the devices' processes and restarts them",
    "outputs.run   logs and checkpoints, under one path of the workspace's own store: a job that was preempted, or that is",
    "              created again, finds its newest checkpoint there and goes on; change it for a run that starts anew",
    "resources     shm_size: NCCL and data loaders need more than Docker's 64 MB",
)


def _job(request: Request, size: str) -> dict[str, Any]:
    up = "/".join([".."] * len(request.folder.split("/")))
    job: dict[str, Any] = {
        "$schema": "https://azuremlschemas.azureedge.net/latest/commandJob.schema.json",
        "type": "command",
        "display_name": request.name,
        "experiment_name": "plait",
        "code": up,
        "command": f"PLAIT_RUN=${{{{outputs.run}}}} bash {shlex.quote(request.folder)}/node.sh",
        "environment": {"image": request.image or _BASE},
        "compute": f"azureml:{_compute(size)}",
        "distribution": {"type": "pytorch", "process_count_per_instance": 1},
        "resources": {"instance_count": request.nodes, "shm_size": "64g"},
        "environment_variables": static_environment(request),
        "outputs": {"run": {"type": "uri_folder", "mode": "rw_mount", "path": f"{_STORE}/paths/plait/{request.name}"}},
        "limits": {"timeout": 604800},  # s, a week
    }
    if not request.image:
        job["environment"]["conda_file"] = "conda.yaml"
    return job


def _compute(size: str) -> str:
    return f"plait-{size.removeprefix('Standard_').replace('_', '-').lower()}"[:24] if size else "cpu-cluster"


def _write(request: Request) -> Job:
    size = (
        need_name(request, "azure", request.devices_per_node, "name a compute cluster by hand")
        if request.part
        else cpu_machine(request, "azure")
    )
    script = node_script(
        request,
        _MEETING,
        engine="Azure ML",
        plan=f"{request.folder}/plan.yaml",
        run_dir=request.run_dir or "$PLAIT_RUN",
        before="" if request.image else _install(),
    )
    compute = _compute(size if request.part else "")
    tier = "low_priority" if request.spot else "dedicated"
    make = (
        f"    az ml compute create --type AmlCompute --name {compute} --size {size} "
        f"--min-instances 0 --max-instances {request.nodes} --tier {tier}"
    )
    text = documents((header(request, "Azure ML", *_NOTES, "", "The cluster, once:", make), _job(request, size)))
    return Job(
        files=(
            File("job.yaml", text),
            File("node.sh", script, executable=True),
            *(() if request.image else (File("conda.yaml", _conda(request)),)),
            File("plan.yaml", request.plan.to_yaml()),
        ),
        submit=Submit(
            words=("az", "ml", "job", "create", "--file", f"{request.folder}/job.yaml"),
            install="install Azure's CLI and `az extension add --name ml`, then `az login` and `az configure --defaults "
            "group=... workspace=...`",
        ),
        notes=(
            f"the compute cluster {compute} must exist: job.yaml's first lines make it",
            *(
                ()
                if request.image
                else (f"node.sh installs {PACKAGE} from the project's folder: put plait's wheel there",)
            ),
        ),
    )


def _install() -> str:
    return f"""\
# plait's wheel comes with the project (in plait's own folder: pip wheel --no-deps -w PROJECT .) and brings torch.
"$PYTHON" -m pip install --quiet "./{PACKAGE}[hf]"
"""


def _conda(request: Request) -> str:
    data = {"name": request.name, "channels": ["conda-forge"], "dependencies": ["python=3.11", "pip"]}
    return documents(("# The Python of job.yaml's environment; node.sh installs plait into it.\n", data))


ENGINE = Engine(
    name="azureml",
    says="an Azure ML command job",
    write=_write,
    aliases=("azure", "aml"),
    sends_project=True,
    sends_files=True,
    takes_spot=True,
)
