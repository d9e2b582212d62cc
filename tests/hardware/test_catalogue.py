from __future__ import annotations

import pytest

from plait.errors import HardwareError
from plait.hardware.catalogue import find, load_accelerators
from plait.hardware.tables import DATA

TABLE = (DATA / "accelerators.csv").read_text(encoding="utf-8").splitlines()


def written(tmp_path, *lines):
    path = tmp_path / "accelerators.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_shipped_table_is_sound():
    """Every part loads, has a source, and says whether its figures were checked."""
    parts = load_accelerators()

    assert len(parts) > 130
    assert all(part.device.source for part in parts.values())


@pytest.mark.parametrize(
    ("word", "name"),
    [("H100-SXM", "NVIDIA H100 SXM5"), ("a100 sxm 80gb", "NVIDIA A100 SXM4 80GB"), ("TPU-v5p", "Google TPU v5p")],
)
def test_aliases_stand_for_parts(word, name):
    """What people type finds the part, letter case and dashes aside."""
    assert find(word).name == name


def test_figures_are_si():
    """The table's TFLOPS, GiB and GB/s become FLOP/s, bytes and bytes/s."""
    device = find("H100").device

    assert device.peak("bf16") == 989e12
    assert device.memory_bytes == 80 * 2**30
    assert device.memory_bandwidth == 3350e9


def test_an_empty_cell_is_not_zero():
    """A figure without a source is missing."""
    assert find("MI250X").device.power_w == 500
    assert find("Google TPU v2").link_bandwidth is None


def test_unknown_part_offers_the_nearest():
    """A slip of the finger gets the right name."""
    with pytest.raises(HardwareError, match="'H1000' is not in the catalogue") as problem:
        find("H1000")
    assert "NVIDIA H100 SXM5" in problem.value.hint
    assert problem.value.exit_status == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",9.53,", ",fast,", "line 5: fp32_tflops='fast' is not a number"),
        (",9.53,", ",-1,", "fp32_tflops=-1 is outside 0 to"),
        (",gpu,", ",toaster,", "category='toaster' is not one of"),
        ("NVIDIA P100 PCIe 16GB", "NVIDIA K80", "'NVIDIA K80' already stands for NVIDIA K80"),
    ],
)
def test_a_broken_table_says_where(tmp_path, old, new, message):
    """A wrong cell is named with its line."""
    path = written(tmp_path, *TABLE[:4], TABLE[4].replace(old, new, 1))
    with pytest.raises(HardwareError, match=message):
        load_accelerators(path)


def test_a_missing_column_is_named(tmp_path):
    """A table without prices' units cannot be read by guessing."""
    with pytest.raises(HardwareError, match="column 'aliases' is missing"):
        load_accelerators(written(tmp_path, "name,vendor", "x,y"))


def test_a_missing_file_is_an_error():
    """A path that is not there is said so."""
    from pathlib import Path

    with pytest.raises(HardwareError, match="No such file"):
        load_accelerators(Path("nowhere.csv"))
