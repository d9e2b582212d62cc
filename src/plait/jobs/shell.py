"""The script that every node runs: environment, then torchrun. Engines say only how a node learns its number.

Everything is set and commented in this one script, whichever engine carries it to the nodes.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import plait
from plait.jobs.placement import placement, table
from plait.jobs.request import Request

__all__ = ["PACKAGE", "Meeting", "header", "node_script", "static_environment"]

PACKAGE = f"plait-{plait.__version__}-py3-none-any.whl"
"""What containers install. A file, so that a package index never decides what `plait` is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """How nodes find each other: shell expressions that the engine's environment makes true."""

    rank: str
    """This node's number, 0 first."""
    head: str
    """The first node's address or name."""
    port: str = "29400"  # torchrun's own default
    note: str = ""
    """Where the two come from."""


def header(request: Request, engine: str, *more: str) -> str:
    """The comment that opens every file: what it is, the plan, where ranks land."""
    nodes = f"{request.nodes} node{'s' if request.nodes > 1 else ''} of {request.devices_per_node}"
    lines = [
        f"{request.name} for {engine}, by `plait launch`: {nodes} {request.part_name}",
        f"target {request.target}",
        f"plan   {request.plan.spec()}",
        "",
        f"Where ranks land: rank = node x {request.devices_per_node} + local rank, tp fastest, then cp, fsdp, dp, pp slowest.",
        *table(placement(request.plan, request.devices_per_node)),
        *([""] if more else []),
        *more,
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def node_script(
    request: Request,
    meeting: Meeting,
    *,
    engine: str,
    plan: str,
    run_dir: str,
    start: str = "",
    before: str = "",
    notes: tuple[str, ...] = (),
) -> str:
    """The script. `plan` and `run_dir` as the node sees them; `start`: lines that go to where TARGET is found from."""
    parts = ["#!/usr/bin/env bash\n" + header(request, engine, *notes) + "set -euo pipefail\n"]
    if start:
        parts.append(start.rstrip("\n") + "\n")
    parts.append(
        "# The interpreter of the environment where plait and torch are installed.\n"
        'PYTHON="${PYTHON:-$(command -v python || command -v python3)}"\n'
    )
    if before:
        parts.append(before.rstrip("\n") + "\n")
    if request.nodes > 1:
        parts.append(_meeting(meeting))
    parts.append(_environment(request))
    if request.part is not None:
        parts.append(_device_check(request))
    parts.append(_torchrun(request, plan, run_dir))
    return "\n".join(parts)


def _meeting(meeting: Meeting) -> str:
    note = f" {meeting.note}" if meeting.note else ""
    return f"""\
# Rendezvous.{note}
NODE_RANK="{meeting.rank}"
HEAD="{meeting.head}"
PORT="{meeting.port}"
# This node's address as the others see it: the one from which it reaches the first node. A first node that calls
# itself 127.x (Debian's /etc/hosts does) takes the address of its default route. Nothing is sent.
ADDRESS="$("$PYTHON" -c 'import socket, sys
def own(towards):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((towards, 9))
        return s.getsockname()[0]
address = own(sys.argv[1])
try:
    print(own("192.0.2.1") if address.startswith("127.") else address)
except OSError:
    print(address)' "$HEAD")"
"""


def static_environment(request: Request) -> dict[str, str]:
    """Variables whose value does not depend on the node."""
    return {
        # Lines of the log when they are written, not when a buffer is full.
        "PYTHONUNBUFFERED": "1",
        # The longest a process waits for the others, in seconds, before it fails and is restarted.
        "PLAIT_TIMEOUT_S": "1800",
        **_device_environment(request),
    }


def _device_environment(request: Request) -> dict[str, str]:
    match request.device:
        case "cuda":
            # One hung collective ends its process, so that the job is restarted instead of waiting for ever.
            return {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
        case "npu":
            # Seconds that Ascend's HCCL waits for all ranks to come.
            return {"HCCL_CONNECT_TIMEOUT": "1800"}
        case "cpu" if request.cpu_only:
            # plait would take an accelerator that it finds.
            return {"PLAIT_DEVICE": "cpu"}
        case _:
            return {}


_INTERFACES = {
    # torch device -> variables of its collective library that name the interface
    "cuda": ("NCCL_SOCKET_IFNAME",),
    "npu": ("HCCL_SOCKET_IFNAME",),
    "hpu": ("HCCL_SOCKET_IFNAME",),
    "xpu": ("CCL_KVS_IFACE", "FI_TCP_IFACE"),
}

_WHY = {
    "PYTHONUNBUFFERED": "Lines of the log as they are written.",
    "PLAIT_TIMEOUT_S": "The longest a process waits for the others, in seconds, before it fails and is restarted.",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "A hung collective ends its process, so that the job restarts instead of waiting for ever.",
    "HCCL_CONNECT_TIMEOUT": "Seconds that HCCL waits until all ranks are there.",
    "PLAIT_DEVICE": "This plan is for processes on the CPU, also where an accelerator is found.",
}


def _threads(request: Request) -> list[str]:
    count = request.devices_per_node
    if not request.cpu_only:
        return [
            f"# Threads of each process: the node's cores, shared by its {count}.",
            f"CORES=$(( $(nproc) / {count} ))",
            'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( CORES > 0 ? CORES : 1 ))}"',
        ]
    ask = f'"$("$PYTHON" -m plait.hardware.placement --processes {count})"'
    lines = ["# Threads of each process; OMP_NUM_THREADS in the job's environment wins."]
    if request.threads:
        lines += [
            f"# {request.threads}: measured by `plait hardware probe` on {request.measured}. A node with another number of",
            "# cores is asked for its own: its probe if it has one, else its cores, NUMA nodes and container's limit.",
            'if [ -z "${OMP_NUM_THREADS:-}" ]; then',
            '    case "$(nproc)" in',
            f"        {request.measured_cores}) OMP_NUM_THREADS={request.threads} ;;",
            f"        *) OMP_NUM_THREADS={ask} ;;",
            "    esac",
            "fi",
            "export OMP_NUM_THREADS",
        ]
    else:
        lines += [
            "# Nothing was measured where this file was written (`plait hardware probe`): the node is asked, by its own probe",
            "# if it has one, else by its cores, NUMA nodes and container's limit.",
            f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{ask}}}"',
        ]
    return [
        *lines,
        "# Each process keeps to its own share of the cores, neighbours in rank on one NUMA node, and so to that node's memory",
        "# (a page lies where the thread that first writes it runs). With more processes than cores they move freely. 0: off.",
        "# OpenMP's threads are not bound one by one (OMP_PROC_BIND, KMP_AFFINITY): what a process starts beside them, gloo's",
        "# threads and data loaders, would inherit its main thread's one core. Set them, and they win.",
        'export PLAIT_PIN="${PLAIT_PIN:-1}"',
    ]


def _environment(request: Request) -> str:
    lines = _threads(request)
    lines += [
        "# A new store for each start. The one that torchrun shares with its processes still holds the addresses of the start",
        "# before, and a restart then fails to connect (pytorch#135712, pytorch#167288; seen with torch 2.13 on two nodes).",
        'export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"',
    ]
    for name, value in static_environment(request).items():
        lines += [f"# {_WHY[name]}", f'export {name}="${{{name}:-{value}}}"']
    if request.nodes > 1:
        found = request.interface or "$(awk '$2 == \"00000000\" { print $1; exit }' /proc/net/route)"
        why = "as asked for" if request.interface else "the one of the default route; name another in INTERFACE"
        names = ("GLOO_SOCKET_IFNAME", *_INTERFACES.get(request.device, ()))
        lines += [
            f"# The network between nodes: {why}.",
            f'INTERFACE="${{INTERFACE:-{found}}}"',
            'if [ -n "$INTERFACE" ]; then',
            *(f'    export {name}="${{{name}:-$INTERFACE}}"' for name in names),
            "fi",
        ]
    return "\n".join(lines) + "\n"


def _device_check(request: Request) -> str:
    return (
        f"# {request.part_name}: a node without them must not train on its CPU instead.\n"
        '"$PYTHON" -c \'import sys, torch\n'
        "found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0\n"
        f'sys.exit(0 if found >= {request.devices_per_node} else f"torch finds {{found}} accelerators here, '
        f"the plan needs {request.devices_per_node} in each node\")'\n"
    )


def _torchrun(request: Request, plan: str, run_dir: str) -> str:
    count = request.devices_per_node
    if request.nodes == 1:
        meet = f"--standalone --nproc-per-node {count} --max-restarts {request.restarts}"
    else:
        meet = (
            f"--nnodes {request.nodes} --nproc-per-node {count} --max-restarts {request.restarts} \\\n"
            f'    --rdzv-backend c10d --rdzv-id {shlex.quote(request.name)} --rdzv-endpoint "$HEAD:$PORT" \\\n'
            '    --rdzv-conf "is_host=$([ "$NODE_RANK" = 0 ] && echo 1 || echo 0),join_timeout=900" --local-addr "$ADDRESS"'
        )
    numactl, before = "", ""
    if request.cpu_only and count == 1:
        before = (
            "# Where its threads reach over several NUMA nodes, a process's memory is spread over them (if numactl is there).\n"
            'read -r -a NUMACTL <<<"$("$PYTHON" -m plait.hardware.placement --processes 1 --numactl)"\n'
        )
        numactl = '${NUMACTL[@]+"${NUMACTL[@]}"} '
    return f"""\
{before}\
# One torchrun in each node starts {count} process{"es" * (count > 1)}. When one dies, all are started again (--max-restarts) and go on from
# the newest checkpoint in --run-dir, which every node must see; --checkpoint-minutes is what can be lost at most.
exec {numactl}"$PYTHON" -m torch.distributed.run \\
    {meet} \\
    -m plait {request.train_text(plan=plan, run_dir=run_dir)}
"""
