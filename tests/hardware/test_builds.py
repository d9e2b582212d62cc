"""Which PyTorch runs on which family."""

from __future__ import annotations

from plait.hardware.builds import build_for
from plait.hardware.catalogue import find, load_accelerators
from plait.hardware.tables import DATA, rows


def test_old_families_need_a_special_build_or_have_none():
    """A Volta runs with builds for CUDA 12.6, a Kepler with none of PyTorch 2, a Hopper with the usual one."""
    volta, kepler = build_for(find("V100")), build_for(find("NVIDIA K80"))

    assert volta is not None
    assert volta.runs
    assert "CUDA 12.6" in volta.says
    assert kepler is not None
    assert not kepler.runs
    assert build_for(find("H100-SXM")) is None


def test_each_row_is_of_a_family_in_the_catalogue_and_has_a_source():
    """A family that is spelled otherwise would be taken to run."""
    families = {part.device.family for part in load_accelerators().values()}

    for _, cells in rows(DATA / "builds.csv", ("family", "runs", "says", "source")):
        assert cells["family"] in families
        assert cells["source"].startswith("https://")
