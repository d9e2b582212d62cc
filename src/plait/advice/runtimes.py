"""Which inference runtime serves a model on a part, in which precision. Unknown is never taken for support."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from plait.errors import HardwareError
from plait.hardware.builds import build_for
from plait.hardware.catalogue import Accelerator
from plait.hardware.tables import rows
from plait.schema.records import Record

__all__ = ["PRECISIONS", "Choice", "Runtime", "choose_runtime", "runtimes"]

_DATA = Path(__file__).parent / "data" / "runtimes.csv"
PRECISIONS = ("bf16", "fp16", "fp32", "fp8", "int8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime(Record):
    """One inference runtime."""

    name: str
    decodes: bool
    """Whether it keeps a key-value cache and batches requests as they come."""
    crosses: bool
    """Whether it is documented to decode with attention to an encoder."""
    forwards: bool
    """Whether it runs the plain forward of any model; some take decoders of the architectures they know only."""
    precisions: tuple[str, ...]
    software: str
    """Whose parameters of the serving cost model hold (cost/data/serving.json)."""
    refuses: tuple[str, ...]
    """Families and parts that it is documented not to run on (any more)."""
    source: str

    def takes(self, part: Accelerator) -> bool:
        """Whether the catalogue lists it for `part` and its own documentation does not leave the part out."""
        out = part.name in self.refuses or part.device.family in self.refuses
        return self.name in part.inference_runtimes and not out


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice(Record):
    """How a model is served on a part."""

    precision: str
    runtime: str
    software: str
    why: str
    others: tuple[str, ...]
    """Further runtimes that accept the part and the precision."""


@functools.cache
def runtimes() -> tuple[Runtime, ...]:
    """All runtimes, the one that is preferred first.

    Raises:
        HardwareError: the table names a precision that does not exist.
    """
    found = []
    for where, cells in rows(
        _DATA, ("runtime", "decodes", "crosses", "forwards", "precisions", "software", "refuses", "source")
    ):
        words = tuple(cells["precisions"].split(";"))
        unknown = sorted(set(words) - set(PRECISIONS))
        if unknown:
            raise HardwareError(f"{where}: precision {unknown[0]!r} is not one of {', '.join(PRECISIONS)}")
        found.append(
            Runtime(
                name=cells["runtime"],
                decodes=cells["decodes"] == "yes",
                crosses=cells["crosses"] == "yes",
                forwards=cells["forwards"] == "yes",
                precisions=words,
                software=cells["software"],
                refuses=tuple(filter(None, cells["refuses"].split(";"))),
                source=cells["source"],
            )
        )
    return tuple(found)


def choose_runtime(
    part: Accelerator, *, decodes: bool, precision: str = "", attends: bool = True, crosses: bool = False
) -> tuple[Choice | None, str]:
    """(runtime and precision for `part`, ''), or (None, why nothing serves it).

    Without `precision` nothing is quantised: bf16 where the part states its rate, else fp16, else fp32. A quantised
    precision changes what the model answers, so it is taken only when asked for. A model that decodes without attention
    (`attends`) keeps a state instead of a cache, which runtimes take for architectures they know: plain PyTorch is certain.
    `crosses`: its decoder attends to an encoder.
    """
    device = part.device
    wanted = [precision] if precision else ["bf16", "fp16", "fp32"]
    stated = [w for w in wanted if w in device.peak_flops]
    if not stated:
        return None, f"{part.name}: no source states its {' or '.join(wanted)} rate"
    cached = decodes and attends
    usable = [r for r in runtimes() if r.takes(part) and (r.decodes if cached else r.forwards and not decodes)]
    if crosses:
        usable = [r for r in usable if r.crosses]
    if not decodes:
        usable.sort(key=lambda r: r.decodes)  # what compiles plain graphs first
    for word in stated:
        able = [r for r in usable if word in r.precisions]
        if able:
            first, others = able[0], tuple(r.name for r in able[1:])
            # What runs a plain forward on a part that no figure is known for is taken at the measured encoders' rates.
            software = first.software if cached or first.software == "neuron" else "fastertransformer"
            why = f"{word} is stated for the part and accepted by {first.name}" + (" (asked for)" if precision else "")
            return Choice(precision=word, runtime=first.name, software=software, why=why, others=others), ""
    build = build_for(part)
    has_torch = bool(device.torch_device) and device.trains and (build is None or build.runs)
    if (crosses or not cached) and has_torch and stated[0] in ("bf16", "fp16", "fp32"):
        software = "vllm" if decodes else "fastertransformer"
        why = f"{stated[0]} is stated; plain PyTorch"
        if crosses:
            why += ": no runtime here is documented to decode with attention to an encoder on it"
        elif decodes:
            why += ": without attention there is no key-value cache, and whether an LLM runtime knows the model is its own to say"
        return Choice(precision=stated[0], runtime="PyTorch", software=software, why=why, others=()), ""
    kind = "that keeps a key-value cache " if decodes else "for plain forwards "
    names = ", ".join(part.inference_runtimes) or "none"
    out = [r.name for r in runtimes() if r.name in part.inference_runtimes and not r.takes(part)]
    if out:
        names += f"; {', '.join(out)} no longer or never took it"
    return None, f"{part.name}: no runtime {kind}is known to accept it in {' or '.join(stated)} (it has: {names})"
