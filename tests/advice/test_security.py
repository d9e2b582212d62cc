"""Security needs against the tables: unknown never counts as yes, and what has to be switched on is said."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from plait.advice.needs import Needs
from plait.advice.retired import refuse_retired, retired
from plait.advice.security import fact, is_encrypted_between, meets, provider, security_notes
from plait.errors import RequestError
from plait.hardware.catalogue import find
from plait.hardware.offers import Offer, load_offers

DATA = Path(__file__).parents[2] / "src" / "plait" / "advice" / "data"


def offer(cloud, name, part="NVIDIA H100 SXM5", count=8, region="us-east-1"):
    return Offer(
        cloud=cloud, instance_type=name, accelerator=part, count=count, vcpus=8.0, memory_bytes=1e12, region=region,
        usd_per_hour=1.0, spot_usd_per_hour=None, as_of="2026-08-20", source="a test",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("need", "part", "cloud", "name", "fine"),
    [
        ("confidential", "NVIDIA H100 NVL", "azure", "Standard_NCC40ads_H100_v5", True),
        ("confidential", "NVIDIA H100 NVL", "azure", "Standard_NC40ads_H100_v5", False),
        ("confidential", "NVIDIA H100 SXM5", "gcp", "a3-highgpu-1g", True),
        ("confidential", "NVIDIA H100 SXM5", "gcp", "a3-highgpu-8g", False),
        ("confidential", "NVIDIA H100 SXM5", "aws", "p5.48xlarge", False),
        ("confidential", "NVIDIA A100 SXM4 80GB", "gcp", "a3-highgpu-1g", False),
        ("single-tenant", "NVIDIA H100 SXM5", "oci", "BM.GPU.H100.8", True),
        ("single-tenant", "NVIDIA A10", "oci", "VM.GPU.A10.1", False),
        ("single-tenant", "NVIDIA H100 SXM5", "aws", "p5.48xlarge", True),
        ("single-tenant", "NVIDIA H100 SXM5", "vast", "8x", False),
        ("no-marketplace", "NVIDIA H100 SXM5", "vast", "8x", False),
        ("no-marketplace", "NVIDIA H100 SXM5", "nobody", "8x", False),
        ("no-marketplace", "NVIDIA H100 SXM5", "lambda", "8x", True),
        ("jurisdiction=eu", "NVIDIA H100 SXM5", "nebius", "8x", True),
        ("jurisdiction=eu", "NVIDIA H100 SXM5", "aws", "p5", False),
        ("jurisdiction=eu", "NVIDIA H100 SXM5", "yotta", "8x", False),
        ("jurisdiction=GB", "NVIDIA H100 SXM5", "hyperstack", "8x", True),
    ],
)
def test_needs_are_met_by_what_the_tables_say(need, part, cloud, name, fine):
    """Each with a reason in words."""
    met, reason = meets(need, find(part), offer(cloud, name, part))

    assert met is fine
    assert reason


@pytest.mark.parametrize(
    ("cloud", "name", "fine"),
    [
        ("aws", "p5.48xlarge", True),
        ("aws", "p3.16xlarge", False),
        ("gcp", "a3-megagpu-8g", True),
        ("gcp", "v5p-128", False),
        ("azure", "Standard_ND96isr_H100_v5", False),
        ("oci", "BM.GPU.H100.8", False),
        ("lambda", "gpu_8x_h100", False),
    ],
)
def test_unknown_networks_are_not_taken_for_encrypted(cloud, name, fine):
    """Only where a source says that traffic between instances is encrypted are they joined under that need."""
    assert is_encrypted_between(offer(cloud, name)) is fine


def test_an_instance_alone_sends_nothing():
    """So it meets the need, with that reason."""
    assert meets("encrypted-network", find("H100-SXM"), offer("lambda", "gpu_8x")) == (
        True,
        "one instance alone: nothing leaves it",
    )


def test_notes_say_what_to_switch_on_and_what_it_costs():
    """On request, with its price and source; a way out where the network is not encrypted."""
    dedicated = " ".join(security_notes(find("H100-SXM"), offer("aws", "p5.48xlarge"), 1))
    plain = " ".join(security_notes(find("H100-SXM"), offer("oci", "BM.GPU.H100.8"), 4))

    assert "tenancy=dedicated" in dedicated
    assert "2 dollars an hour" in dedicated
    assert "https://" in dedicated
    assert "WireGuard" in plain
    assert "NVLink between Hopper GPUs is not encrypted" in plain
    assert "hosts of unknown owners" in " ".join(security_notes(find("H100-SXM"), offer("vast", "8x"), 1))


def test_every_row_has_a_source_and_every_cloud_is_known_or_left_unknown():
    """A fact without a source is none; clouds that sell offers have a provider's row, but for those nobody could name."""
    with (DATA / "security.csv").open(encoding="utf-8") as file:
        assert all(row["source"] for row in csv.DictReader(file))
    unnamed = {o.cloud for o in load_offers() if provider(o.cloud) is None}

    assert unnamed <= {"yotta"}
    assert fact("confidential", offer("crusoe", "x")).answer == "unknown"


@pytest.mark.parametrize(
    ("word", "successor"),
    [
        ("AWS Elastic Inference", "Inferentia2"),
        ("eia", "Inferentia2"),
        ("NNVM", "TVM"),
        ("apache mxnet", "PyTorch"),
        ("PyTorch-Mobile", "ExecuTorch"),
        ("TFLite", "LiteRT"),
        ("tensorflow_lite", "LiteRT"),
    ],
)
def test_retired_products_answer_with_successor_and_source(word, successor):
    """Under any of the names people use."""
    product = retired(word)

    assert product is not None
    assert successor in product.successor
    assert product.source.startswith("https://")
    with pytest.raises(RequestError, match="has been retired") as caught:
        refuse_retired(word)
    assert "source: https://" in caught.value.hint


@pytest.mark.parametrize("need", ["region=", "jurisdiction= ", "confidential=yes", "secure", "single-tenent"])
def test_needs_that_do_not_exist_are_refused(need):
    """With those that do."""
    with pytest.raises(RequestError, match="is not a need") as caught:
        Needs(require=(need,))

    assert "encrypted-network" in caught.value.hint
