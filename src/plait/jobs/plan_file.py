"""What a plan file says beside its plan: the target and the cluster that it was made for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from plait.errors import HardwareError
from plait.hardware.catalogue import find
from plait.schema import Plan

__all__ = ["MadeFor", "made_for"]


@dataclass(frozen=True, slots=True)
class MadeFor:
    """Empty texts where the file, or the SPEC, says nothing."""

    target: str = ""
    cluster: str = ""

    @property
    def part(self) -> str:
        """The accelerator of a cluster such as 16xH100-SXM; `cpu` for processes; empty where it is another's name."""
        match = re.fullmatch(r"\d+\s*x\s*([^+]+)", self.cluster.strip())
        return match.group(1).strip() if match else ""

    def notes(self, target: str, part: str | None, *, is_cpu: bool) -> tuple[str, ...]:
        """What differs between what the plan was made for and what is launched."""
        found = []
        if self.target and self.target != target:
            found.append(f"the plan was made for the target {self.target}: another model may need another plan")
        if self.cluster and not self.part:
            if part is None and not is_cpu:
                found.append(f"the plan was made for the cluster {self.cluster}, whose accelerators it does not name")
        elif self.part and _catalogue_name(self.part) != ("cpu" if is_cpu else part):
            found.append(
                f"the plan was made for {self.cluster}: on other devices it may not fit, or not be the fastest"
            )
        return tuple(found)


def _catalogue_name(part: str) -> str:
    try:
        return "cpu" if part.lower() == "cpu" else find(part).name
    except HardwareError:  # an accelerator of somebody's own cluster file
        return part


def made_for(plan: str | Plan) -> MadeFor:
    """Read from a file that `Plan.load` has read already; nothing of a SPEC."""
    if isinstance(plan, Plan) or not Path(plan).is_file():
        return MadeFor()
    import yaml

    data = yaml.safe_load(Path(plan).read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        return MadeFor()
    target, cluster = (data.get(name) for name in ("target", "cluster"))
    return MadeFor(target if isinstance(target, str) else "", cluster if isinstance(cluster, str) else "")
