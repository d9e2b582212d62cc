"""Engines' names of accelerators."""

from __future__ import annotations

import pytest

from plait.errors import HardwareError
from plait.hardware.catalogue import find, load_accelerators
from plait.hardware.tables import rows
from plait.jobs.names import TABLE, counts_of, name_of, resource_of


def test_every_row_names_a_part_of_the_catalogue_and_its_source():
    """No name without a source, no part that nobody can ask for, no key twice."""
    seen = set()
    for where, cells in rows(TABLE, ("part", "engine", "count", "name", "source")):
        key = (cells["part"], cells["engine"], cells["count"])
        assert key not in seen, where
        seen.add(key)
        assert cells["name"], where
        assert cells["source"], where
        assert cells["part"] in load_accelerators() or cells["part"].startswith("vendor "), where


@pytest.mark.parametrize(
    ("part", "engine", "count", "name"),
    [
        ("H100", "skypilot", None, "H100"),
        ("A100-80GB", "skypilot", None, "A100-80GB"),
        ("H100", "aws", 8, "p5.48xlarge"),
        ("A100-80GB", "azure", 8, "Standard_ND96amsr_A100_v4"),
        ("TPU-v5p", "tpu-type", 8, "v5p-16"),  # v5p counts TensorCores, two a chip
        ("TPU-v5e", "tpu-topology", 16, "4x4"),
        ("Apple M1", "aws", 1, None),
    ],
)
def test_names(part: str, engine: str, count: int | None, name: str | None):
    """As the engine spells it, or nothing."""
    assert name_of(find(part), engine, count) == name


def test_topologies_hold_their_chips():
    """A topology's sides multiply to the chips of its slice."""
    for part in map(find, ("TPU-v4", "TPU-v5e", "TPU-v5p", "TPU-v6e")):
        for chips, topology in counts_of(part, "tpu-topology").items():
            product = 1
            for side in topology.split("x"):
                product *= int(side)

            assert product == chips, (part.name, topology)


@pytest.mark.parametrize(
    ("part", "resource"),
    [
        ("H100", "nvidia.com/gpu"),
        ("MI300X", "amd.com/gpu"),
        ("Gaudi3", "habana.ai/gaudi"),
        ("TPU-v5e", "google.com/tpu"),
    ],
)
def test_resources(part: str, resource: str):
    """By vendor, and by torch device where a vendor has two."""
    assert resource_of(find(part)) == resource


def test_a_vendor_without_a_plugin_is_refused():
    """No resource is invented."""
    with pytest.raises(HardwareError, match="Kubernetes' resource name of Apple M1"):
        resource_of(find("Apple M1"))
