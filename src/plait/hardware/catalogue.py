"""The accelerators that ship with plait, each figure with its source."""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path

from plait.errors import HardwareError
from plait.hardware.tables import choice, number, rows, usable
from plait.schema.cluster import Device
from plait.schema.records import Record
from plait.units import GB, GIB, TERA

__all__ = ["Accelerator", "find", "load_accelerators"]

_COLUMNS = (  # noqa: SIM905 - one line a person can compare with the header
    "name,aliases,vendor,family,category,programmability,trains,year,status,successor,fp32_tflops,tf32_tflops,"
    "fp16_tflops,bf16_tflops,fp8_tflops,int8_tops,memory_gib,memory_type,memory_bandwidth_gbs,link_name,"
    "link_bandwidth_gbs,max_scale_up,tdp_w,torch_device,frameworks,inference_runtimes,collective_library,"
    "confidential_computing,multi_tenant_isolation,source,verified"
).split(",")
_RATES = {
    "fp32": "fp32_tflops",
    "tf32": "tf32_tflops",
    "fp16": "fp16_tflops",
    "bf16": "bf16_tflops",
    "fp8": "fp8_tflops",
    "int8": "int8_tops",
}
_CATEGORIES = ("gpu", "tpu", "npu", "cpu", "wafer", "asic")
_KINDS = ("dedicated", "semi-dedicated", "general")


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator(Record):
    """One row of accelerators.csv: the device's figures and what joins several of them."""

    device: Device
    aliases: tuple[str, ...]
    vendor: str
    year: int | None
    status: str
    successor: str
    memory_type: str
    link_name: str
    link_bandwidth: float | None
    """Bytes per second for each accelerator, one direction, all its links added up."""
    max_scale_up: int | None
    """Accelerators in one fast domain; None: not known."""
    frameworks: tuple[str, ...]
    inference_runtimes: tuple[str, ...]
    confidential_computing: str
    multi_tenant_isolation: str

    @property
    def name(self) -> str:
        """The catalogue's key."""
        return self.device.name


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(";") if word.strip())


def _accelerator(where: str, cells: dict[str, str]) -> Accelerator:
    peaks = {name: number(where, cells, column, scale=TERA, high=1e6) for name, column in _RATES.items()}
    year = number(where, cells, "year", high=2100)
    scale_up = number(where, cells, "max_scale_up", high=1e6)
    return Accelerator(
        device=Device(
            name=cells["name"],
            peak_flops={name: value for name, value in peaks.items() if value is not None},
            memory_bytes=number(where, cells, "memory_gib", scale=GIB, high=1e6),
            memory_bandwidth=number(where, cells, "memory_bandwidth_gbs", scale=GB, high=1e8),
            power_w=number(where, cells, "tdp_w", high=1e5),
            family=cells["family"],
            category=choice(where, cells, "category", _CATEGORIES),
            programmability=choice(where, cells, "programmability", _KINDS),
            trains=choice(where, cells, "trains", ("yes", "no")) == "yes",
            torch_device=cells["torch_device"],
            collective_library=cells["collective_library"],
            verified=choice(where, cells, "verified", ("yes", "no")) == "yes",
            source=cells["source"],
        ),
        aliases=_words(cells["aliases"]),
        vendor=cells["vendor"],
        year=None if year is None else int(year),
        status=cells["status"],
        successor=cells["successor"],
        memory_type=cells["memory_type"],
        link_name=cells["link_name"],
        link_bandwidth=number(where, cells, "link_bandwidth_gbs", scale=GB, high=1e6),
        max_scale_up=None if scale_up is None else int(scale_up),
        frameworks=_words(cells["frameworks"]),
        inference_runtimes=_words(cells["inference_runtimes"]),
        confidential_computing=cells["confidential_computing"],
        multi_tenant_isolation=cells["multi_tenant_isolation"],
    )


@functools.cache
def load_accelerators(path: Path | None = None) -> dict[str, Accelerator]:
    """Every accelerator by name, checked.

    Raises:
        HardwareError: the table is unreadable, a name or alias is used twice, or a figure is absurd.
    """
    return usable("accelerators.csv", _read) if path is None else _read(path)


def _read(path: Path) -> dict[str, Accelerator]:
    found: dict[str, Accelerator] = {}
    owners: dict[str, str] = {}
    for where, cells in rows(path, _COLUMNS):
        part = _accelerator(where, cells)
        for word in (part.name, *part.aliases):
            if not word:
                raise HardwareError(f"{where}: name is empty")
            if owners.setdefault(_key(word), part.name) != part.name or part.name in found:
                raise HardwareError(f"{where}: {word!r} already stands for {owners[_key(word)]}")
        found[part.name] = part
    for part in found.values():
        if part.successor and part.successor not in found:
            raise HardwareError(f"{path}: {part.name} names the successor {part.successor!r}, which is not there")
    return found


def _key(word: str) -> str:
    return re.sub(r"[\s_-]+", "-", word.strip().lower())


@functools.cache
def _words_of_parts() -> dict[str, Accelerator]:
    return {_key(word): part for part in load_accelerators().values() for word in (part.name, *part.aliases)}


def find(name: str) -> Accelerator:
    """The accelerator called `name`: its own name or an alias, letter case and dashes aside.

    Raises:
        HardwareError: there is none; the nearest names are in the hint.
    """
    words = _words_of_parts()
    if (part := words.get(_key(name))) is not None:
        return part
    near = difflib.get_close_matches(_key(name), words, n=4, cutoff=0.4)
    near += [word for word in words if _key(name) in word and word not in near][: 4 - len(near)]
    names = list(dict.fromkeys(words[word].name for word in near))
    raise HardwareError(
        f"accelerator {name!r} is not in the catalogue",
        hint=(f"nearest: {', '.join(names)}; " if names else "") + "`plait hardware list` prints all, "
        "a cluster file can describe another",
    )
