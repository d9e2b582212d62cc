"""Amazon SageMaker: a script that starts a training job with SageMaker's Python SDK (version 3, ModelTrainer)."""

from __future__ import annotations

import shlex

from plait.jobs.names import cpu_machine, need_name
from plait.jobs.request import Engine, File, Job, Request, Submit
from plait.jobs.shell import PACKAGE, Meeting, header, node_script, static_environment

__all__ = ["ENGINE"]

_MEETING = Meeting(
    rank="$SM_CURRENT_HOST_RANK",
    head="$SM_MASTER_ADDR",
    port="$SM_MASTER_PORT",
    note="SageMaker's container driver sets them.",
)


def _write(request: Request) -> Job:
    if request.part is None:
        instance = f"ml.{cpu_machine(request, 'aws')}"
    else:
        instance = (
            f"ml.{need_name(request, 'aws', request.devices_per_node, 'put its instance type into submit.py by hand')}"
        )
    before = [
        "# The interface that SageMaker's nodes talk over.",
        'INTERFACE="${INTERFACE:-${SM_NETWORK_INTERFACE_NAME:-}}"',
    ]
    if not request.image:
        before += [
            "# plait's wheel comes with the project (in plait's own folder: pip wheel --no-deps -w PROJECT .).",
            f'"$PYTHON" -m pip install --quiet "./{PACKAGE}[hf]"',
        ]
    node = node_script(
        request,
        _MEETING,
        engine="SageMaker",
        plan=f"{request.folder}/plan.yaml",
        run_dir=request.run_dir or f"/opt/ml/checkpoints/{request.name}",
        before="\n".join(before),
    )
    return Job(
        files=(
            File("submit.py", _submit(request, instance), executable=True),
            File("node.sh", node, executable=True),
            File("plan.yaml", request.plan.to_yaml()),
        ),
        submit=Submit(
            words=("python", f"{request.folder}/submit.py"),
            install="pip install sagemaker-train, then set SAGEMAKER_ROLE and AWS credentials",
            module="sagemaker.train",
            variables=("SAGEMAKER_ROLE",) if request.image else ("SAGEMAKER_ROLE", "IMAGE"),
        ),
        notes=(
            "set SAGEMAKER_ROLE to an execution role, and IMAGE where --image names none",
            *(
                ()
                if request.image
                else (f"node.sh installs {PACKAGE} from the project's folder: put plait's wheel there",)
            ),
        ),
    )


def _submit(request: Request, instance: str) -> str:
    image = f'os.environ.get("IMAGE", "{request.image}")' if request.image else 'os.environ["IMAGE"]'
    spot = (
        "\n        enable_managed_spot_training=True,  # an interruption brings new nodes; the run goes on from its checkpoint"
        if request.spot
        else ""
    )
    wait = "\n        max_wait_time_in_seconds=10 * DAY,  # for spot capacity, the job included" if request.spot else ""
    environment = "".join(f'        "{name}": "{value}",\n' for name, value in static_environment(request).items())
    return f'''\
#!/usr/bin/env python3
{header(request, "Amazon SageMaker", "    SAGEMAKER_ROLE=arn:... IMAGE=... python submit.py       from the project's folder", "IMAGE: a container with Python 3.11, such as an AWS Deep Learning Container for PyTorch of your region.")}\
"""Start the training job with SageMaker's Python SDK 3 (pip install sagemaker-train)."""

import os

from sagemaker.core.shapes import CheckpointConfig
from sagemaker.core.training.configs import Compute, SourceCode, StoppingCondition
from sagemaker.train import ModelTrainer

DAY = 24 * 3600  # s

trainer = ModelTrainer(
    base_job_name="{request.name}",
    role=os.environ["SAGEMAKER_ROLE"],
    training_image={image},
    # The project, sent along. node.sh starts one torchrun in each node, so no other launcher is asked for.
    source_code=SourceCode(source_dir=".", command="bash {shlex.quote(request.folder)}/node.sh"),
    compute=Compute(
        instance_type="{instance}",
        instance_count={request.nodes},
        volume_size_in_gb=200,{spot}
    ),
    stopping_condition=StoppingCondition(
        max_runtime_in_seconds=5 * DAY,{wait}
    ),
    # What is written under /opt/ml/checkpoints is kept in S3, and is there again when the job is restarted.
    checkpoint_config=CheckpointConfig(
        s3_uri=os.environ.get("CHECKPOINTS", "s3://BUCKET/plait/{request.name}"),
        local_path="/opt/ml/checkpoints",
    ),
    environment={{
{environment}    }},
)

if __name__ == "__main__":
    trainer.train(wait=False)
    print("started; follow it with: aws sagemaker list-training-jobs --name-contains {request.name}")
'''


ENGINE = Engine(
    name="sagemaker",
    says="a SageMaker training job",
    write=_write,
    aliases=("aws", "aws-sagemaker"),
    sends_project=True,
    sends_files=True,
    takes_spot=True,
)
