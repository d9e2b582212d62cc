"""Processes that stay for all tests of running and verifying."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from plait.run.processes import Workers

sys.path.insert(0, str(Path(__file__).parent))  # the processes import `checking` by this name


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Four processes; a call takes as many of them as it needs."""
    from plait.run.processes import Workers

    with Workers(4, threads=1) as pool:
        yield pool
