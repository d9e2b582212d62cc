"""Google Cloud TPU: a script that asks for a queued resource and starts the job in it.

plait's runtime reaches devices through `torch.accelerator`. TPUs appear there only with a torch backend for them; the
script checks that on the TPU and stops, rather than train on the host's CPU (`shell._device_check`).
"""

from __future__ import annotations

from plait.errors import HardwareError, PlanError
from plait.jobs.names import counts_of, name_of, need_name
from plait.jobs.request import Engine, File, Job, Request, Submit
from plait.jobs.shell import PACKAGE, Meeting, header, node_script

__all__ = ["BACKEND", "ENGINE", "slice_type_of"]

BACKEND = (
    "plait drives devices through torch.accelerator: install a torch backend that shows TPUs there, else node.sh stops "
    "with the number of accelerators it finds"
)


def slice_type_of(request: Request) -> str:
    """The slice's type for all chips of the request.

    Raises:
        HardwareError: not a TPU, or no slice has so many chips in such hosts.
    """
    part = request.part
    if part is None or part.vendor != "Google":
        raise HardwareError(
            "launch: Google Cloud TPU needs a TPU", hint="pass --gpu-type TPU-v5e, TPU-v5p, TPU-v6e or TPU-v4"
        )
    chips = request.nodes * request.devices_per_node
    name = need_name(request, "tpu-type", chips, "another plan") if counts_of(part, "tpu-type") else None
    if name is None:
        return need_name(request, "tpu-type", None, "pass --gpu-type TPU-v5e, TPU-v5p, TPU-v6e or TPU-v4")
    if request.nodes > 1 and request.devices_per_node != 4:
        raise PlanError(
            f"launch: hosts of a slice of {chips} {part.name} have 4 chips each, not {request.devices_per_node}",
            hint=f"pass --devices-per-node 4 --nodes {chips // 4}",
        )
    return name


def _write(request: Request) -> Job:
    slice_type, part = slice_type_of(request), request.part
    assert part is not None
    runtime = name_of(part, "tpu-runtime") or "RUNTIME"
    node = node_script(
        request,
        Meeting(
            rank="$(curl -s -H 'Metadata-Flavor: Google' $META/agent-worker-number)",
            head="$(curl -s -H 'Metadata-Flavor: Google' $META/worker-network-endpoints | cut -d, -f1 | cut -d: -f3)",
            note="The TPU VM's metadata has its number and all workers' addresses.",
        ),
        engine="Google Cloud TPU",
        plan="$HOME/job/plan.yaml",
        run_dir=request.run_dir or "$HOME/runs/" + request.name,
        before="META=http://metadata.google.internal/computeMetadata/v1/instance/attributes\n"
        "# queue.sh put plait here.\nPYTHON=$HOME/plait/bin/python\ncd ~/project",
    )
    return Job(
        files=(
            File("queue.sh", _queue(request, slice_type, runtime), executable=True),
            File("node.sh", node, executable=True),
            File("plan.yaml", request.plan.to_yaml()),
        ),
        submit=Submit(
            words=("bash", f"{request.folder}/queue.sh"),
            program="gcloud",
            variables=("ZONE",),
            install="install Google Cloud's CLI, then `gcloud auth login` and `gcloud config set project PROJECT`",
        ),
        notes=(
            BACKEND,
            f"queue.sh installs {PACKAGE} from the project's folder: put plait's wheel there",
            "checkpoints stay on the workers' disks: pass --run-dir on storage that all mount (Cloud Storage FUSE, NFS)",
        ),
    )


def _queue(request: Request, slice_type: str, runtime: str) -> str:
    spot = " \\\n        --spot" if request.spot else ""
    return f"""\
#!/usr/bin/env bash
{header(request, "Google Cloud TPU", "    ZONE=us-east5-b bash queue.sh       asks for the slice, waits, sends the project, starts", "    gcloud compute tpus queued-resources delete NAME --zone ZONE --force      afterwards: an active slice costs money")}\
set -euo pipefail

NAME="${{NAME:-{request.name}}}"
ZONE="${{ZONE:?set it to a zone that has {slice_type}}}"
FOLDER="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
command -v gcloud >/dev/null || {{ echo "queue.sh: gcloud is not installed" >&2; exit 2; }}

# {request.nodes * request.devices_per_node} chips; a request that is there already is waited for again.
gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" >/dev/null 2>&1 ||
    gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \\
        --accelerator-type {slice_type} --runtime-version {runtime}{spot}

# At most a day; the request stays in the queue afterwards too.
for _ in $(seq 1440); do
    STATE="$(gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" --format 'value(state.state)')"
    case "$STATE" in
        ACTIVE) break ;;
        FAILED | SUSPENDED) echo "queue.sh: $NAME is $STATE" >&2; exit 1 ;;
    esac
    sleep 60
done
[ "$STATE" = ACTIVE ] || {{ echo "queue.sh: $NAME still waits ($STATE); start this script again" >&2; exit 1; }}

on_all() {{ gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker all --command "$1"; }}
on_all 'mkdir -p ~/job ~/project'
gcloud compute tpus tpu-vm scp --recurse --worker all --zone "$ZONE" . "$NAME":project/
gcloud compute tpus tpu-vm scp --worker all --zone "$ZONE" "$FOLDER/node.sh" "$FOLDER/plan.yaml" "$NAME":job/
# Python 3.11 and plait, in each worker.
on_all 'python3 -m pip install --quiet uv && python3 -m uv venv --quiet --allow-existing --python 3.11 ~/plait &&
    python3 -m uv pip install --quiet --python ~/plait/bin/python "$HOME/project/{PACKAGE}[hf]"'
on_all 'bash ~/job/node.sh'
"""


ENGINE = Engine(
    name="gcp-tpu",
    says="a queued resource of Google Cloud TPU",
    write=_write,
    aliases=("tpu", "gcp"),
    sends_project=True,
    takes_spot=True,
)
