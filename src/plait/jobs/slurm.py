"""Slurm: an sbatch file that starts one torchrun in each node."""

from __future__ import annotations

import shlex

from plait.jobs.request import Engine, File, Job, Request, Submit
from plait.jobs.shell import Meeting, header, node_script

__all__ = ["ENGINE", "slurm_files"]

MEETING = Meeting(
    rank="$SLURM_NODEID",
    head='$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
    # Two jobs may share a first node; their numbers differ.
    port="$(( 20000 + SLURM_JOB_ID % 20000 ))",
    note="Slurm numbers the nodes along its topology, so that neighbours in the network are neighbours in rank.",
)


def slurm_files(
    request: Request, engine: str, *, before: str = "", directives: tuple[str, ...] = ()
) -> tuple[File, ...]:
    """job.sbatch, node.sh and the plan."""
    run_dir = request.run_dir or f"runs/{request.name}"
    node = node_script(
        request,
        MEETING,
        engine=engine,
        plan="$PLAIT_JOB/plan.yaml",
        run_dir=run_dir,
        before=before,
        notes=("Started by job.sbatch, once in each node.",),
    )
    return (
        File("job.sbatch", _sbatch(request, engine, directives)),
        File("node.sh", node, executable=True),
        File("plan.yaml", request.plan.to_yaml()),
    )


def _sbatch(request: Request, engine: str, directives: tuple[str, ...]) -> str:
    count = request.devices_per_node
    lines = [
        f"#SBATCH --job-name={request.name}",
        "# One task in each node: torchrun, which starts a process for each device.",
        f"#SBATCH --nodes={request.nodes}",
        "#SBATCH --ntasks-per-node=1",
        "# Whole nodes: threads, memory and links are shared by this job's own processes only.",
        "#SBATCH --exclusive",
    ]
    if request.part is not None:
        lines += [
            f"# {request.part.name}. Where the site names types, ask for them: --gpus-per-node=TYPE:{count}",
            f"#SBATCH --gpus-per-node={count}",
        ]
    if request.cpu_only:
        how = f"as measured on {request.measured}" if request.threads else "one thread each at least"
        lines += [
            f"# Nodes with a core for every thread at least: {count} process{'es' * (count > 1)}, {how}.",
            f"#SBATCH --cpus-per-task={request.cores}",
        ]
    if request.nodes > 1:
        lines += [
            "# All nodes under one switch, for up to an hour's wait; then as they come.",
            "#SBATCH --switches=1@01:00:00",
        ]
    lines += [
        "# A node that fails puts the job back into the queue; it goes on from its newest checkpoint.",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=%x-%j.log",
        "# Also needed at many sites:",
        "##SBATCH --partition=PARTITION",
        "##SBATCH --account=ACCOUNT",
        "##SBATCH --time=24:00:00",
        *directives,
    ]
    return f"""\
#!/usr/bin/env bash
{header(request, engine, f"    sbatch {shlex.quote(request.folder)}/job.sbatch       from the project's folder, on storage that all nodes see")}\
#
{chr(10).join(lines)}

set -euo pipefail
# sbatch runs a copy of this file, so the job's folder is named, not looked for.
export PLAIT_JOB="{request.folder}"

# -K: one task that fails ends the others. {_binding(request)}
srun -K --ntasks-per-node=1 --cpu-bind=none bash "$PLAIT_JOB/node.sh"
"""


def _binding(request: Request) -> str:
    if request.cpu_only:
        return (
            "--cpu-bind=none and no --cpus-per-task here: the task has the whole node, and\n"
            "# plait gives each of its processes cores and NUMA node of its own (node.sh: PLAIT_PIN)."
        )
    return "--cpu-bind=none: the task, and so its processes, may use all cores of the node."


def _write(request: Request) -> Job:
    return Job(
        files=slurm_files(request, "Slurm"),
        submit=Submit(
            words=("sbatch", f"{request.folder}/job.sbatch"),
            install="sbatch is part of Slurm: run this on a login node of the cluster",
        ),
        notes=("partition, account and time limit are the site's own: see the end of job.sbatch's options",),
    )


ENGINE = Engine(name="slurm", says="an sbatch file for a Slurm cluster", write=_write)
