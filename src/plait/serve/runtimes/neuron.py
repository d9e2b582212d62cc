"""AWS Neuron: refused by name, since neither its compiler nor a check of what one would write for it can be had here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.subject import Subject

__all__ = ["Neuron"]


class Neuron(Backend):
    """Trainium and Inferentia."""

    name = "neuron"
    status: ClassVar[Literal["run", "prepared"]] = "prepared"

    def missing(self) -> str:
        """What it would take."""
        return (
            "planned, not there: it needs torch-neuronx and neuronx-cc, which come from AWS's own package index and compile "
            "for Trainium and Inferentia only; without them nothing that plait writes could be checked"
        )

    def export(self, subject: Subject, folder: Path, precision: str) -> Mapping[str, Any]:
        """Never called."""
        raise NotImplementedError(self.missing())

    def load(self, artefact: Artefact) -> Runner:
        """Never called."""
        raise NotImplementedError(self.missing())
