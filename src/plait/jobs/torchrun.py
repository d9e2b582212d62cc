"""torchrun: one script for every node, and one that starts it on all of them over ssh."""

from __future__ import annotations

import shlex

from plait.jobs.request import Engine, File, Job, Request, Submit
from plait.jobs.shell import Meeting, header, node_script

__all__ = ["ENGINE"]

_HERE = '"$(dirname "${BASH_SOURCE[0]}")"'


def _write(request: Request) -> Job:
    run_dir = request.run_dir or f"runs/{request.name}"
    script = node_script(
        request,
        Meeting(
            rank="${NODE_RANK:?set it to the number of this node, from 0}",
            head="${MASTER_ADDR:?set it to the address of node 0}",
            port="${MASTER_PORT:-29400}",
            note="Set by whoever starts this script (start.sh does); MASTER_ADDR is node 0's address for the others.",
        ),
        engine="torchrun",
        plan="$FOLDER/plan.yaml",
        run_dir=run_dir,
        start=_start_here(request),
        notes=_usage(request),
    )
    files = [File("node.sh", script, executable=True), File("plan.yaml", request.plan.to_yaml())]
    if request.nodes == 1:
        return Job(files=tuple(files), submit=Submit(words=("bash", f"{request.folder}/node.sh"), install=_INSTALL))
    files.insert(1, File("start.sh", _start(request), executable=True))
    notes = () if request.hosts else (f"write the {request.nodes} hosts into start.sh, or pass --hosts A,B,...",)
    return Job(
        files=tuple(files),
        submit=Submit(words=("bash", f"{request.folder}/start.sh"), install=_INSTALL, program="ssh"),
        notes=(*notes, f"every node needs this folder at the same path, and {run_dir} on storage that all see"),
    )


_INSTALL = "bash is needed in one node, ssh too for several"


def _usage(request: Request) -> tuple[str, ...]:
    if request.nodes == 1:
        return ("    bash node.sh",)
    return (
        "In every node, or from one place by start.sh:",
        f"    NODE_RANK=0..{request.nodes - 1} MASTER_ADDR=<address of node 0> bash node.sh",
    )


def _start_here(request: Request) -> str:
    """Into the project's folder, relative to this file where both lie together."""
    if request.folder.startswith("/") or request.folder[1:2] == ":":
        project = shlex.quote(request.root.as_posix())
    else:
        up = "/".join([".."] * len(request.folder.split("/")))
        project = f'"$FOLDER/{up}"'
    return f'FOLDER="$(cd {_HERE} && pwd)"\n# TARGET is relative to the project\'s folder.\ncd {project}'


def _start(request: Request) -> str:
    hosts = " ".join(shlex.quote(host) for host in request.hosts) or "FIRST_HOST SECOND_HOST"
    return f"""\
#!/usr/bin/env bash
{header(request, "torchrun", "Starts node.sh in every node over ssh, and ends all of them when one fails or you press Ctrl-C.")}\
set -euo pipefail

# In the order of their numbers; neighbours in this list should be neighbours in the network.
HOSTS=({hosts})
FOLDER="$(cd {_HERE} && pwd)"

if [ "${{#HOSTS[@]}}" -ne {request.nodes} ] || [ "${{HOSTS[0]}}" = FIRST_HOST ]; then
    echo "start.sh: write the {request.nodes} hosts into HOSTS" >&2
    exit 2
fi

# The first host's address for the others: its name without a user's.
HEAD="${{HOSTS[0]#*@}}"
# For the shell at the other end, whichever it is.
quote() {{ printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\\\\\''/g")"; }}
# -tt: the remote end stops when this one does.
PIDS=()
trap 'kill "${{PIDS[@]}}" 2>/dev/null || true' EXIT
for RANK in "${{!HOSTS[@]}}"; do
    ssh -tt -o BatchMode=yes -- "${{HOSTS[$RANK]}}" \\
        "NODE_RANK=$RANK MASTER_ADDR=$HEAD PYTHON=$(quote "${{PYTHON:-python3}}") bash $(quote "$FOLDER/node.sh")" \\
        </dev/null &
    PIDS+=("$!")
done
for PID in "${{PIDS[@]}}"; do
    wait -n
done
"""


ENGINE = Engine(name="torchrun", says="torch's own launcher, in one node or several over ssh", write=_write)
