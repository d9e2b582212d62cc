"""How much of a data sheet's rates is reached: parameters of accelerator families, links and software generations.

`data/calibration.json` holds them with their source or the fit that made them (benchmarks/fit_cost.py). A parameter
belongs to a family (`Hopper`), a link (`InfiniBand`) or a software generation (`megatron-core`), never to a row or a
model. What a cluster file's devices state under `efficiency` (from a probe or a calibration) comes first.

Parameters and their unit:

    matmul         fraction of peak that a large 16- or 32-bit matmul reaches
    matmul_low     the same for fp8 and fp4
    grouped        fraction of the matmul rate that an expert matmul reaches
    attention      fraction of the matmul rate that fused attention reaches in the forward, counting the causal half
    attention_back the same in the backward
    traffic        fraction of a matmul's memory traffic that its arithmetic does not hide
    memory         fraction of peak bandwidth that operators with little arithmetic reach
    fusion         bytes moved by them over those of eager PyTorch (a compiler moves fewer)
    scale          of all these rates together: what a code base loses between kernels
    kernel         s, least time of one kernel on the device
    launch         s, host time to start one operator; the longer of host and device counts
    launch_collective  s, host time to start one collective
    stall          s, host time added to each ring step of a tp collective where a pipeline's sends run as well
    tp_hop         s, added to a tp collective for each node that its group spans beyond the first
    tp_crossing    further fraction of the bandwidth between nodes that a tp collective, which nothing overlaps, reaches
    messages       messages for each segment in which gradients and updated weights travel
    step           s, host time of a step outside the model
    tp_overlap, dp_overlap, cp_overlap, ep_overlap, pp_overlap
                   fraction of that communication that runs beside compute
    slowdown       what one second of hidden communication adds to compute
    spread         added for each doubling of nodes by waiting for the slowest
    optimizer      fraction of peak bandwidth that the optimizer reaches
    overhead       bytes that allocator and libraries hold, as a fraction of the rest; overhead_bytes: constant
    node, rack, site, device
                   fraction of a link's bandwidth that collectives reach; *_latency: times the stated latency
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.schema.cluster import Cluster, Device
from plait.schema.records import Record

__all__ = ["Calibration", "Software", "load_calibration", "software_for"]

DATA = Path(__file__).parent / "data" / "calibration.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Software(Record):
    """What a code base does, as its documentation or source says; fitted figures are in `parameters`."""

    name: str
    source: str
    generation: str = ""
    """Whose parameters hold where this software has none of its own."""
    match: tuple[str, ...] = ()
    """Regular expressions on a table row's `source | precision | family`."""
    fused_attention: bool = True
    dropout: bool = False
    """Of models with plain MLPs (GPT)."""
    balanced_stages: bool = False
    """Pipeline stages are cut by cost, output projection included, rather than by equal numbers of layers."""
    weight_bytes: float = 2.0
    """Bytes for each parameter in mixed precision that every replica holds (zero below 3)."""
    gradient_bytes: float = 4.0
    state_bytes: float = 12.0
    """fp32 master copy and two moments."""
    reduce_bytes: float = 4.0
    """Bytes for each gradient on the wire."""
    sharded_weight_bytes: float = 4.0
    """Bytes for each parameter that a shard stores under zero=3."""
    sharded_gradient_bytes: float = 4.0
    sharded_state_bytes: float = 8.0
    sequence_parallel: bool = False
    """Used with tensor parallelism without being asked."""
    keeps_gathered: bool = False
    """With sequence parallelism: gathered inputs are kept for the backward, not gathered again."""
    fused_loss: bool = False
    """A compiled loss keeps no logits in fp32."""
    selective_keeps: float = 1.0
    """Part of the matmul results that selective recomputation keeps."""
    parameters: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration(Record):
    """All parameters, most general first."""

    defaults: dict[str, float]
    categories: dict[str, dict[str, float]]
    """By device category (gpu, tpu, cpu)."""
    families: dict[str, dict[str, float]]
    links: dict[str, dict[str, float]]
    """By a word in the link's name (NVLink, InfiniBand)."""
    generations: dict[str, dict[str, float]]
    """By a generation of software (kernels and compilers of one age and kind)."""
    software: tuple[Software, ...]
    provenance: dict[str, str]
    """How the figures were found: script, date, rows."""

    def resolve(self, device: Device, software: Software) -> dict[str, float]:
        """The parameters that hold for `software` on `device`, the more special one winning."""
        return {
            **self.defaults,
            **self.categories.get(device.category, {}),
            **self.families.get(device.family, {}),
            **self.generations.get(software.generation, {}),
            **software.parameters,
            **self.families.get(f"{device.family}+{software.name}", {}),
            **device.efficiency,
        }

    def link_factors(
        self, cluster: Cluster, parameters: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """(efficiency, latency) factors by level of `cluster`'s network."""
        efficiency, latency = {}, {}
        for link in cluster.links:
            words = next((values for word, values in self.links.items() if word.lower() in link.name.lower()), {})
            efficiency[link.level] = parameters.get(link.level, words.get("efficiency", 0.8))
            latency[link.level] = parameters.get(f"{link.level}_latency", words.get("latency", 1.0))
        return efficiency, latency

    def software_named(self, name: str) -> Software:
        """The software called `name`."""
        return next(item for item in self.software if item.name == name)


@functools.cache
def load_calibration(path: Path = DATA) -> Calibration:
    """The shipped parameters."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Calibration.from_dict(data)


def software_for(source: str, device: Device, precision: str, calibration: Calibration) -> Software:
    """The software generation that a table's row was run with; a general one where the source is not known."""
    text = f"{source} | {precision} | {device.family}"
    for item in calibration.software:
        if any(re.search(pattern, text, re.IGNORECASE) for pattern in item.match):
            return item
    if device.category == "tpu":
        return calibration.software_named("xla")
    return calibration.software_named("transformer-engine" if precision in ("fp8", "fp4") else "pytorch")
