from __future__ import annotations

from itertools import pairwise

import pytest

from plait.errors import HardwareError
from plait.hardware.clusters import load_cluster, named_cluster
from plait.schema import Cluster, Device, Group, Link


@pytest.mark.parametrize(
    ("name", "devices", "levels"),
    [
        ("8xH100-SXM", 8, [("node", 8)]),
        ("64xA100-SXM-80GB", 64, [("node", 8), ("site", 64)]),
        ("256xTPU-v5p", 256, [("rack", 8960)]),
        ("128xAscend-910B", 128, [("node", 8), ("site", 128)]),
        ("16xZionEX", 128, [("node", 8), ("site", 128)]),
        ("144xGB200", 144, [("rack", 72), ("site", 144)]),
        ("16xH100-PCIe", 16, [("device", 2), ("node", 8), ("site", 16)]),
        ("1xH100", 1, [("node", 8)]),
    ],
)
def test_named_clusters_have_usual_nodes(name, devices, levels):
    """COUNTxPART becomes nodes as that part is usually built."""
    found = named_cluster(name)

    assert found.devices == devices
    assert [(link.level, link.size) for link in found.links] == levels


def test_unverified_figures_are_said():
    """What rests on a row that nobody checked says so."""
    assert any("not verified" in note for note in named_cluster("128xAscend-910B").notes)
    assert named_cluster("128xAscend-910B").unverified() == ("Huawei Ascend 910B3",)


def test_two_kinds_in_one_cluster():
    """Groups of different accelerators share the slower network."""
    mixed = named_cluster("8xH100+8xV100")

    assert [group.count for group in mixed.groups] == [8, 8]
    assert mixed.links[-1].bandwidth == 6.25e9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("H100", "neither a file nor COUNTxPART"),
        ("0xH100", "neither a file nor COUNTxPART"),
        ("8xH1000", "is not in the catalogue"),
        ("4xMI250", "bandwidth between devices is not known"),
        ("8xInferentia2", "not in the catalogue|cannot train"),
        ("missing.yaml", "No such file"),
    ],
)
def test_bad_names_are_refused(name, message):
    """A short message says what is wrong."""
    with pytest.raises(HardwareError, match=message):
        load_cluster(name)


SHORT = """
name: lab
groups:
  - {part: A100-SXM-80GB, count: 16, usd_per_hour: 1.9}
links:
  - {level: node, size: 8, bandwidth_gbs: 300, latency_us: 6}
  - {level: site, size: 16, bandwidth_gbs: 25, latency_us: 8}
"""


def test_a_short_file_is_enough(tmp_path):
    """A part's figures come from the catalogue, the links from the file."""
    path = tmp_path / "lab.yaml"
    path.write_text(SHORT, encoding="utf-8")

    found = load_cluster(str(path))

    assert found.groups[0].device.name == "NVIDIA A100 SXM4 80GB"
    assert found.groups[0].usd_per_hour == 1.9
    assert found.links[1].latency == pytest.approx(8e-6)


def test_a_whole_file_comes_back_equal(tmp_path):
    """What is written out is read back."""
    import yaml

    whole = named_cluster("16xH100")
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(whole.to_dict()), encoding="utf-8")

    assert Cluster.load(str(path)) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "cluster file"),
        ("- 1", "a mapping is needed"),
        ("name: x", "groups.*missing|no devices"),
        ("&a {name: x, groups: [*a], links: []}", "refers to itself"),
        (SHORT.replace("count: 16", "count: many"), "count: int is needed"),
        (SHORT.replace("bandwidth_gbs: 300", "bandwidth_gbs: -3"), "not a believable figure"),
        (SHORT.replace("bandwidth_gbs: 300", "bandwidth_gbs: fast"), "is not a number"),
        (SHORT.replace("size: 16", "size: 4"), "must rise"),
        (SHORT.replace("latency_us", "delay"), "unknown key 'delay'"),
        (SHORT.replace("count: 16", "count: 99999999999"), "not a believable number of devices"),
        ("name: x\ngroups: {part: A100}\nlinks: []\n", "groups: a list is needed"),
        ("name: x\ngroups: []\nlinks: 7\n", "links: a list is needed, got 7"),
        ("groups: " + "[" * 5000, "recursion"),
        (
            "a: &a [1, 1, 1]\n"
            + "".join(f"{q}: &{q} [{', '.join([f'*{p}'] * 9)}]\n" for p, q in pairwise("abcdefghijkl"))
            + "groups: *l\nlinks: []\nname: x\n",
            "unknown key 'a'",
        ),
        (SHORT.replace("A100-SXM-80GB", "A1000"), "not in the catalogue"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, message):
    """The file and the field are named, the status is 2."""
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(HardwareError, match=message) as problem:
        load_cluster(str(path))
    assert problem.value.exit_status == 2


def test_two_kinds_of_device_have_two_names():
    """Devices are told apart by name, so a name stands for one set of figures."""
    one, other = (Device(name="part", peak_flops={"bf16": rate}) for rate in (1e12, 2e12))
    with pytest.raises(HardwareError, match="two groups are called part but have different figures"):
        Cluster(
            name="x",
            groups=(Group(device=one, count=1), Group(device=other, count=1)),
            links=(Link(level="node", size=2, bandwidth=1e9, latency=1e-6),),
        )
