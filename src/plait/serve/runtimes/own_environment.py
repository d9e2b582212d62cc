"""Backends whose runtime cannot be installed beside plait's torch: found in an environment of their own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from plait.environments.make import find
from plait.environments.names import COMMAND
from plait.errors import RequestError, ServeError

__all__ = ["interpreter_of", "missing_in"]


def interpreter_of(environment: str) -> str:
    """The environment's Python.

    Raises:
        ServeError: it is not made; the hint is the command that makes it.
    """
    try:
        return str(find(environment))
    except RequestError as problem:
        raise ServeError(problem.message, hint=problem.hint) from None


def missing_in(environment: str, imports: Sequence[str]) -> str:
    """What is not there and the command that makes it, in one line; empty where all is there."""
    absent = [name for name in imports if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed: {COMMAND} {environment}" if absent else ""
