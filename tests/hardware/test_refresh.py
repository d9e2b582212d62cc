from __future__ import annotations

import pytest

from plait.errors import HardwareError
from plait.hardware.refresh import ages, install
from plait.hardware.tables import DATA, table_path


def test_newer_tables_are_used(tmp_path, monkeypatch):
    """A checked table is read from then on."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    assert table_path("offers.csv") == DATA / "offers.csv"

    install(offers=DATA / "offers.csv")

    assert table_path("offers.csv").is_relative_to(tmp_path)
    assert ages()["newest_price"] >= "2026"


def test_a_broken_table_changes_nothing(tmp_path, monkeypatch):
    """A table that does not load is not installed."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(HardwareError, match="is missing"):
        install(offers=bad)
    assert table_path("offers.csv") == DATA / "offers.csv"
