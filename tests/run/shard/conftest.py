"""Two processes that stay for all the cases of a test run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the workers import `harness` and `models` by these names


@pytest.fixture(scope="session")
def pair() -> Iterator[Any]:
    """A group of two."""
    import harness

    workers = harness.Workers(2)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Any]:
    """A group of four."""
    import harness

    workers = harness.Workers(4)
    yield workers
    workers.close()
