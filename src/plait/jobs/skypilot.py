"""SkyPilot: a task that finds the accelerator on any cloud, on spot too, and recovers."""

from __future__ import annotations

from typing import Any

from plait.jobs.names import need_name
from plait.jobs.request import Engine, File, Job, Request, Submit
from plait.jobs.shell import PACKAGE, Meeting, header, node_script
from plait.jobs.yaml_text import documents

__all__ = ["ENGINE"]

_MEETING = Meeting(
    rank="$SKYPILOT_NODE_RANK",
    head='$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
    note="SkyPilot sets both in every node.",
)
_NOTES = (
    "workdir      the project, sent to every node; TARGET is relative to it",
    "job_recovery a lost node (spot or not) brings a new cluster, in the next region if need be; errors of the job",
    "             itself are retried as often as max_restarts_on_errors says",
    "file_mounts  /checkpoints is a bucket that outlives the nodes; the run goes on from its newest checkpoint",
    "network_tier best: the cloud's fast network between nodes, where it has one",
)


def _resources(request: Request) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if request.part is None:
        found["cpus"] = f"{request.cores}+"
    else:
        name = need_name(request, "skypilot", None, "put its name under `resources: accelerators:` by hand")
        found["accelerators"] = {name: request.devices_per_node}
    found["use_spot"] = request.spot
    if request.nodes > 1:
        found["network_tier"] = "best"
    found["job_recovery"] = {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": request.restarts}
    if request.image:
        found["image_id"] = f"docker:{request.image}"
    return found


def _write(request: Request) -> Job:
    run_dir = request.run_dir or f"/checkpoints/{request.name}"
    run = node_script(
        request, _MEETING, engine="SkyPilot", plan="$HOME/plait/plan.yaml", run_dir=run_dir,
        before='# setup put plait here.\nPYTHON="$HOME/plait/venv/bin/python"',
    )  # fmt: skip
    task = {
        "name": request.name,
        "workdir": ".",
        "num_nodes": request.nodes,
        "resources": _resources(request),
        "file_mounts": {
            "/checkpoints": {"name": f"plait-{request.name}", "mode": "MOUNT"},
            "~/plait/plan.yaml": f"{request.folder}/plan.yaml",
        },
        "setup": _setup(),
        "run": run,
    }
    return Job(
        files=(
            File("task.yaml", documents((header(request, "SkyPilot", *_NOTES), task))),
            File("plan.yaml", request.plan.to_yaml()),
        ),
        submit=Submit(
            words=("sky", "jobs", "launch", "--yes", f"{request.folder}/task.yaml"),
            install="pip install 'skypilot[aws,gcp,azure,...]', then `sky check`",
        ),
        notes=(
            f"setup installs {PACKAGE} from the project's folder: put plait's wheel there",
            f"the bucket plait-{request.name} is made in your account; bucket names are global, change it if taken",
        ),
    )


def _setup() -> str:
    return f"""\
# Once on each node. plait's wheel comes with the project (in plait's own folder: pip wheel --no-deps -w PROJECT .).
set -e
python3 -m pip install --quiet uv    # brings Python 3.11, whichever the machine has
python3 -m uv venv --quiet --allow-existing --python 3.11 ~/plait/venv
python3 -m uv pip install --quiet --python ~/plait/venv/bin/python "./{PACKAGE}[hf]"
"""


ENGINE = Engine(
    name="skypilot",
    says="a SkyPilot task: any cloud, spot with recovery",
    write=_write,
    aliases=("sky",),
    sends_project=True,
    takes_spot=True,
)
