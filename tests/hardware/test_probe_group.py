from __future__ import annotations

import json
import sys

import pytest

from plait.errors import HardwareError
from plait.hardware import probe_group
from plait.hardware.probe_group import measure_together


def instead(monkeypatch, code):
    """Processes that run `code` instead of measuring."""
    import subprocess

    def start(*_):
        return subprocess.Popen(
            [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    monkeypatch.setattr(probe_group, "_start", start)


def test_figures_carry_how_many_worked(monkeypatch):
    """Names say with how many processes at once a figure was measured."""
    instead(monkeypatch, f"print({json.dumps(json.dumps({'matmul': [1.0], 'send/ranks=2/8': [2.0]}))})")

    assert measure_together(2, 1, seconds=20) == {
        "matmul/processes=2": [1.0],
        "send/processes=2/ranks=2/8": [2.0],
    }


@pytest.mark.parametrize("values", [[0.0, 1.0], [], [-1.0], [float("nan")]])
def test_no_time_is_no_measurement(monkeypatch, values):
    """A failed measurement is refused, never a zero."""
    instead(monkeypatch, f"print({json.dumps(json.dumps({'matmul': values}))})")
    with pytest.raises(HardwareError, match="measuring matmul with 1 processes"):
        measure_together(1, 1, seconds=20)


def test_a_failed_process_is_named(monkeypatch):
    """Its last line says why."""
    instead(monkeypatch, "raise SystemExit('no network')")
    with pytest.raises(HardwareError, match="process 0 of 2 failed: no network"):
        measure_together(2, 1, seconds=20)


def test_a_stuck_process_is_ended(monkeypatch):
    """The probe does not wait for ever."""
    instead(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(HardwareError, match=r"took over 0\.5 s"):
        measure_together(1, 1, seconds=0.5)
