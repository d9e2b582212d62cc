"""A complete decision: mesh, microbatches, schedule, precision, and what happens to each segment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from plait.errors import PlanError
from plait.schema.records import Record

__all__ = ["AXES", "PRECISIONS", "RECOMPUTE", "SCHEDULES", "Plan"]

AXES = ("dp", "fsdp", "tp", "pp", "cp", "ep")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zerobubble")
RECOMPUTE = ("none", "selective", "full")
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "fp4")

_WORDS: dict[str, tuple[str, ...]] = {
    "schedule": SCHEDULES,
    "recompute": RECOMPUTE,
    "precision": PRECISIONS,
    "sequence_parallel": ("no", "yes"),
}
_SHARE = re.compile(r"(?:(\d{1,9})x)?(\d{1,12})", re.ASCII)
_MOST_REPLICAS = 10**6  # far above any cluster; keeps a mistyped count from filling memory
_NUMBERS = (*AXES, "zero", "microbatches", "interleave")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(Record):
    """How one training step is spread over devices.

    Ranks are laid out with tp fastest, then cp, fsdp, dp, and pp slowest.
    """

    dp: int = 1
    """Replicas."""
    fsdp: int = 1
    """Shards of parameters, gradients and optimizer state; samples are split over dp x fsdp."""
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 3
    """What fsdp shards: 1 optimizer state, 2 gradients too, 3 parameters too."""
    microbatches: int = 0
    """Parts a step's batch is cut into; 0: chosen when the batch is known (see `bound`)."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zerobubble"] = "1f1b"
    interleave: int = 1
    """Pipeline stages on each rank (virtual stages)."""
    recompute: Literal["none", "selective", "full"] = "none"
    precision: Literal["fp32", "bf16", "fp16", "fp8", "fp4"] = "fp32"
    sequence_parallel: Literal["no", "yes"] = "no"
    """Whether tp also splits what lies between its matmuls, along the sequence."""
    batch_shares: tuple[int, ...] = ()
    """Samples of the global batch by replica (dp x fsdp), where they differ; another batch, and each microbatch, is
    split in the same proportion. Empty: all the same. As text, `3:1`, or `4x12:4x4` for four of 12 and four of 4."""
    cuts: tuple[int, ...] = ()
    """First segment of stages 1, 2, ...; empty: cut evenly by cost."""
    recompute_segments: dict[str, str] | None = None
    """Segment index to recompute choice, where it differs from `recompute`."""

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            low = 0 if name == "microbatches" else 1
            if value < low:
                raise PlanError(f"plan: {name}={value} must be at least {low}")
        if self.zero not in (1, 2, 3):
            raise PlanError(f"plan: zero={self.zero} is not 1, 2 or 3")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise PlanError(f"plan: {name}={getattr(self, name)} is not one of {', '.join(words)}")
        if self.batch_shares and len(self.batch_shares) != self.replicas:
            raise PlanError(
                f"plan: batch_shares has {len(self.batch_shares)} shares, dp x fsdp = {self.replicas} replicas need one each"
            )
        if any(share < 1 for share in self.batch_shares):
            raise PlanError(f"plan: batch_shares {_shares_text(self.batch_shares)}: a share must be at least 1")
        if self.cuts and len(self.cuts) != self.stages - 1:
            raise PlanError(f"plan: {self.stages} stages need {self.stages - 1} cuts, got {len(self.cuts)}")
        if list(self.cuts) != sorted(set(self.cuts)) or (self.cuts and self.cuts[0] < 1):
            raise PlanError(f"plan: cuts {list(self.cuts)} must rise and start at 1 or later")
        for index, choice in (self.recompute_segments or {}).items():
            if not index.isdigit() or choice not in RECOMPUTE:
                raise PlanError(f"plan: recompute_segments {index}: {choice} is not one of {', '.join(RECOMPUTE)}")

    @property
    def devices(self) -> int:
        """Devices the plan needs: dp x fsdp x tp x pp x cp (ep lies within dp x fsdp)."""
        return self.dp * self.fsdp * self.tp * self.pp * self.cp

    @property
    def replicas(self) -> int:
        """Ways the samples are split: dp x fsdp."""
        return self.dp * self.fsdp

    @property
    def stages(self) -> int:
        """Pipeline stages in all: pp x interleave."""
        return self.pp * self.interleave

    def recompute_of(self, segment: int) -> str:
        """The recompute choice of a segment."""
        return (self.recompute_segments or {}).get(str(segment), self.recompute)

    def bound(self, *, devices: int | None = None, batch: int | None = None) -> Plan:
        """The plan with its open values chosen, after checking it against devices and batch.

        Open microbatches become 1 without a pipeline; with one, the largest of 2 x stages,
        stages that divides the samples of a replica, else as many as there are samples, at most 2 x stages.

        Raises:
            PlanError: degrees do not multiply to the devices, or the batch is too small.
        """
        if devices is not None and self.devices != devices:
            product = " x ".join(f"{a}={getattr(self, a)}" for a in ("dp", "fsdp", "tp", "pp", "cp"))
            raise PlanError(
                f"plan: {product} needs {self.devices} devices, --devices gives {devices}",
                hint=f"change the degrees so that they multiply to {devices}, or pass --devices {self.devices}",
            )
        if batch is None:
            return self
        samples = batch // self.replicas
        count = self.microbatches
        if count == 0:
            count = 1
            if self.pp > 1:
                # Multiples of pp: interleaved and zero-bubble schedules go in rounds of that many.
                good = [m for m in (2 * self.stages, self.stages) if samples and samples % m == 0]
                count = good[0] if good else max(1, min(samples, 2 * self.stages))
        if batch < self.replicas * count:
            raise PlanError(
                f"plan: a batch of {batch} is smaller than dp x fsdp x microbatches = "
                f"{self.dp} x {self.fsdp} x {count} = {self.replicas * count}",
                hint=f"use --batch {self.replicas * count} or more, or fewer microbatches",
            )
        return replace(self, microbatches=count)

    def spec(self) -> str:
        """The short text form: what differs from the default, `dp=1` when nothing does."""
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in (*_NUMBERS, *_WORDS) and value != field.default:
                parts.append(f"{field.name}={value}")
            elif field.name == "batch_shares" and value:
                parts.append(f"batch_shares={_shares_text(value)}")
        return ",".join(parts) or "dp=1"

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan of a SPEC such as `dp=2,pp=2,microbatches=4`.

        Raises:
            PlanError: a part is unknown, repeated or no number.
        """
        values: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, sign, value = (piece.strip() for piece in part.partition("="))
            if not sign or name not in (*_NUMBERS, *_WORDS, "batch_shares"):
                known = ", ".join((*_NUMBERS, *_WORDS, "batch_shares"))
                raise PlanError(f"plan: {part!r} is not NAME=VALUE with a known name", hint=f"known names: {known}")
            if name in values:
                raise PlanError(f"plan: {name} is given twice")
            if name in _NUMBERS and not value.isdigit():
                raise PlanError(f"plan: {name}={value} is not a whole number")
            if name == "batch_shares":
                values[name] = _shares_of(value)
            else:
                values[name] = int(value) if name in _NUMBERS else value
        return cls(**values)

    @classmethod
    def load(cls, plan: Plan | str | Path) -> Plan:
        """A Plan from itself, a SPEC text or a YAML file's path.

        Raises:
            PlanError: the file is missing or malformed, or the SPEC is.
        """
        if isinstance(plan, Plan):
            return plan
        path = Path(plan)
        if isinstance(plan, str) and path.suffix not in (".yaml", ".yml", ".json") and not path.is_file():
            return cls.parse(plan)
        import yaml

        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as problem:
            raise PlanError(f"plan file {path}: {str(problem).splitlines()[0]}") from None
        if isinstance(data, dict) and isinstance(data.get("plan"), dict):
            data = data["plan"]
        try:
            return cls.from_dict(data)
        except ValueError as problem:
            raise PlanError(f"plan file {path}: {problem}") from None

    def to_yaml(self) -> str:
        """The whole plan as YAML, which `load` reads back equal."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))


def _shares_text(shares: Sequence[int]) -> str:
    runs = [(share, len(list(alike))) for share, alike in groupby(shares)]
    return ":".join(f"{count}x{share}" if count > 1 else str(share) for share, count in runs)


def _shares_of(text: str) -> tuple[int, ...]:
    """The shares of `3:1` or `4x12:4x4`."""
    found: list[int] = []
    for piece in text.split(":"):
        match = _SHARE.fullmatch(piece.strip())
        if match is None or int(match[1] or 1) > _MOST_REPLICAS:
            raise PlanError(f"plan: batch_shares={text} is not SHARE:SHARE:... or COUNTxSHARE:...",
                            hint="write for example batch_shares=3:1 for dp=2, or 4x12:4x4 for dp=8")  # fmt: skip
        found += [int(match[2])] * int(match[1] or 1)
    return tuple(found)
