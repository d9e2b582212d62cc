"""Two processes that stay, and the modules they import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from plait.run.processes import Workers

sys.path.insert(0, str(Path(__file__).parent))  # the processes import `proving` by this name


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Two processes."""
    from plait.run.processes import Workers

    with Workers(2, threads=1) as pool:
        yield pool
