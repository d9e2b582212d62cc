"""Backends whose runtime cannot be installed beside plait's torch: found in an environment of their own."""

from __future__ import annotations

import importlib.util

from plait.environments.make import find
from plait.environments.names import COMMAND
from plait.errors import RequestError, ServeError
from plait.serve.backend import Backend

__all__ = ["OwnEnvironment"]


class OwnEnvironment(Backend):
    """A backend that runs in the environment of its own name."""

    def interpreter(self) -> str:
        """The environment's Python.

        Raises:
            ServeError: it is not made; the hint is the command that makes it.
        """
        try:
            return str(find(self.name))
        except RequestError as problem:
            raise ServeError(problem.message, hint=problem.hint) from None

    def missing(self) -> str:
        """What is not there and the command that makes it, in one line; empty where all is there."""
        absent = [name for name in self.imports if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed: {COMMAND} {self.name}" if absent else ""
