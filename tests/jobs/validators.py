"""Engines' own schemas and parsers over the files that `plait launch` writes.

    python tests/jobs/validators.py ENGINE FILE     in any environment that has the engine's package; status 0: accepted

No plait here: heavy packages live in an environment of their own (see test_validators.py).
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any


def check_kubernetes(path: str) -> None:
    """Kubeflow Trainer's package holds pydantic models of Kubernetes, JobSet and the Trainer.

    They skip keys that they do not know, so what they read is written out again and must hold all that was there.
    """
    import yaml
    from kubeflow_trainer_api import models

    kinds = {
        ("v1", "Service"): models.IoK8sApiCoreV1Service,
        ("batch/v1", "Job"): models.IoK8sApiBatchV1Job,
        ("jobset.x-k8s.io/v1alpha2", "JobSet"): models.JobsetV1alpha2JobSet,
        ("trainer.kubeflow.org/v1alpha1", "TrainJob"): models.TrainerV1alpha1TrainJob,
    }
    documents = list(yaml.safe_load_all(Path(path).read_text(encoding="utf-8")))
    for document in documents:
        kind = document["kind"]
        if kind == "ConfigMap":
            assert set(document) == {"apiVersion", "kind", "metadata", "data"}
            assert all(isinstance(text, str) for text in document["data"].values())
            continue
        model = kinds[document["apiVersion"], kind]
        read = model.from_dict(document).to_dict()
        lost = missing(document, read)
        assert not lost, f"{kind}: not known to its schema: {lost}"


def missing(given: Any, read: Any, where: str = "") -> list[str]:
    """Places of `given` that `read` lacks or holds with another value."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [
            place
            for key, value in given.items()
            for place in ([f"{where}.{key}"] if key not in read else missing(value, read[key], f"{where}.{key}"))
        ]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return [p for i, (g, r) in enumerate(zip(given, read, strict=True)) for p in missing(g, r, f"{where}[{i}]")]
    return [] if given == read else [where]


def check_skypilot(path: str) -> None:
    """SkyPilot's task parser, which checks its JSON schema first."""
    import sky

    task = sky.Task.from_yaml(path)
    assert task.run
    assert task.setup


def check_azureml(path: str) -> None:
    """Azure ML's loader and its own validation."""
    from azure.ai.ml import load_job

    job = load_job(path)
    found = job._validate()  # what `create_or_update` calls before it sends anything
    assert type(job).__name__ == "Command"
    assert found.passed, found.error_messages


def check_sagemaker(path: str) -> None:
    """SageMaker's SDK builds the trainer; its pydantic models refuse keys and values that they do not know."""
    os.environ.update(
        SAGEMAKER_ROLE="arn:aws:iam::123456789012:role/role",
        IMAGE="image:1",
        CHECKPOINTS="s3://bucket/prefix",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ACCESS_KEY_ID="none",
        AWS_SECRET_ACCESS_KEY="none",
    )
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.train import defaults

    # Role and bucket are looked up in the account, which cannot be done here.
    defaults.resolve_and_validate_role = lambda provided_role, **_: provided_role
    Session.default_bucket = lambda _: "bucket"
    trainer = runpy.run_path(path, run_name="checked")["trainer"]
    assert trainer.compute.instance_type.startswith("ml.")
    assert trainer.source_code.command.endswith("node.sh")


def check_parallelcluster(path: str) -> None:
    """ParallelCluster's schema of a cluster."""
    import yaml

    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    from pcluster.schemas.cluster_schema import ClusterSchema

    data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    # Only a person knows these.
    data["Region"] = "us-east-1"
    data["HeadNode"]["Networking"]["SubnetId"] = "subnet-01234567890abcdef"
    data["Scheduling"]["SlurmQueues"][0]["Networking"]["SubnetIds"] = ["subnet-01234567890abcdef"]
    ClusterSchema(cluster_name="plait").load(data)


if __name__ == "__main__":
    engine, file = sys.argv[1:]
    globals()[f"check_{engine}"](file)
