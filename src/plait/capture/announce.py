"""Saying what takes long, once it does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["said_after"]


@contextmanager
def said_after(seconds: float, say: Callable[[str], None], text: str) -> Iterator[None]:
    """Says the text if what is done within takes longer than this."""
    timer = threading.Timer(seconds, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
