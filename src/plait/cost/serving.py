"""Seconds, bytes and rates of serving one model: prefill, decode with a key-value cache, or a plain forward.

    matmul     max(FLOP / (peak x efficiency), bytes of weights / (bandwidth x efficiency)) + a part of the smaller
    attention  decode reads the cache; prefill computes half of the square
    pass       matmuls + attention + what is written between them + kernels started + all-reduces
    decode     one pass of `batch` rows: weights are read once, the cache of every row once
    request    prefill of its input + one decode for each token; a full engine does `batch` of them side by side
    throughput batch x output / (output x decode + batch x prefill)

A pipeline of `pp` stages keeps `pp` parts of the batch under way: each token passes all stages, at the part's size.
Experts: a pass reads those that its tokens meet. Weights are split evenly over stages. An encoder runs once over a prompt,
every position attending to all; the decoder's passes read the keys and values made of it.

Source: Pope et al. (2022), arXiv 2211.05102 (what bounds prefill and decode); Williams et al. (2009), roofline.
Known error: `plait.cost.served_figures` compares with published figures; docs/advise.md has the table.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.cost.comms import Hop, all_reduce, hops, send
from plait.cost.serving_work import Served
from plait.errors import PlanError
from plait.schema.cluster import Cluster, Device
from plait.schema.records import Record

__all__ = [
    "ELEMENT_BYTES", "Load", "ServingEstimate", "ServingMemory", "ServingPlan", "batches", "estimate_serving", "fitted_families",
    "parameters_for", "room",
]  # fmt: skip

ELEMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0}
USABLE = 0.94  # of stated memory: drivers, contexts and the allocator hold 6 to 10 % (hardware/data, traps)
CHUNK = 8192  # tokens of one prefill pass: what engines use by default (vLLM and TensorRT-LLM: 8,192)
LARGEST_BATCH = 1024  # sequences an engine takes at once where nothing else limits it (vLLM V1's default)
_DATA = Path(__file__).parent / "data" / "serving.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingPlan(Record):
    """How one replica is spread, and how many there are."""

    tp: int = 1
    pp: int = 1
    replicas: int = 1
    precision: str = "bf16"
    """Of weights and of the arithmetic on them; with fp8 and int8 the rest stays in 16 bits."""
    cache_precision: str = ""
    """Of keys and values; empty: fp8 with fp8 weights, else 16 bits (32 with fp32)."""
    batch: int = 1
    """Sequences (samples) of one replica under way."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "replicas", "batch"):
            if getattr(self, name) < 1:
                raise PlanError(f"serving plan: {name}={getattr(self, name)} must be at least 1")
        for name in ("precision", "cache_precision"):
            value = getattr(self, name)
            if value not in ELEMENT_BYTES and not (name == "cache_precision" and not value):
                raise PlanError(f"serving plan: {name}={value} is not one of {', '.join(ELEMENT_BYTES)}")

    @property
    def devices(self) -> int:
        """Devices of all replicas."""
        return self.tp * self.pp * self.replicas

    @property
    def wide(self) -> float:
        """Bytes of an element that is not quantised."""
        return 4.0 if self.precision == "fp32" else 2.0

    @property
    def cache_bytes(self) -> float:
        """Bytes of a cached element."""
        usual = "fp8" if self.precision == "fp8" else "fp32" if self.precision == "fp32" else "bf16"
        return ELEMENT_BYTES[self.cache_precision or usual]

    def spec(self) -> str:
        """Text such as `tp=4,pp=2,replicas=3,batch=64,precision=fp8`."""
        parts = [f"{n}={getattr(self, n)}" for n in ("tp", "pp", "replicas") if getattr(self, n) > 1]
        return ",".join([*parts, f"batch={self.batch}", f"precision={self.precision}"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Load(Record):
    """What a request looks like; both 0 for a plain forward of samples."""

    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def length(self) -> int:
        """Positions cached when a request ends."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingMemory(Record):
    """Bytes on one device."""

    weights: float
    cache: float
    """Keys and values of all sequences at their full length."""
    activations: float
    """Of one pass: the largest operator and the scores."""

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.weights + self.cache + self.activations


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingEstimate(Record):
    """What a serving plan is predicted to give."""

    plan: ServingPlan
    load: Load
    throughput: float
    """Output tokens (samples) per second of all replicas, kept full."""
    latency: float
    """Seconds between two tokens of a request while the engine is full, other requests' prefills included; of one batch
    where nothing is decoded."""
    first_token: float
    """Seconds of one prompt's prefill when nothing else waits; of one batch where nothing is decoded."""
    decode: float
    """Seconds of one decode pass of the whole batch."""
    parts: dict[str, float]
    """Seconds of that pass (of a plain forward): weights, compute, cache, plain, launch, communication, step."""
    first_parts: dict[str, float]
    """Seconds of the first token, in the same parts."""
    memory: ServingMemory
    memory_limit: float | None
    largest_batch: int
    """Sequences of one replica that memory holds at full length."""
    mfu: float

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.memory_limit is None or self.memory.total <= self.memory_limit

    @property
    def request(self) -> float:
        """Seconds of a whole request while the engine is full."""
        return self.latency * max(1, self.load.output_tokens)


@functools.cache
def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return found


def parameters_for(device: Device, software: str = "") -> dict[str, float]:
    """The parameters that hold on `device` with `software`, the more special one winning; measured ones win over all."""
    data = _data()
    family = data["families"].get(device.family, {})
    measured = {k: v for k, v in device.efficiency.items() if k in ("matmul", "memory", "kernel")}
    return {
        **data["defaults"],
        **data["categories"].get(device.category, {}),
        **family,
        **data["software"].get(software, {}),
        **measured,
    }


def fitted_families() -> frozenset[str]:
    """Families of accelerators of which a published figure was used."""
    return frozenset(_data()["families"])


@dataclass(frozen=True, slots=True)
class _Rates:
    matmul: float
    """FLOP/s on weights."""
    wide: float
    """FLOP/s in 16 (32) bits: attention and the output projection."""
    bandwidth: float
    cache: float
    """Bytes/s of reading the cache."""
    p: Mapping[str, float]


def _rates(device: Device, precision: str, p: Mapping[str, float]) -> _Rates:
    bandwidth = device.need("memory_bandwidth") * p["memory"]
    low = precision in ("fp8", "int8")
    half = "fp32" if precision == "fp32" else "fp16" if precision == "fp16" else "bf16"
    wide = device.peak(half) * p["matmul"] * p["scale"]
    dense = device.peak(precision) * p["matmul_low"] * p["scale"] if low else wide
    return _Rates(dense, wide, bandwidth, bandwidth * p["cache"], p)


class _Replica:
    """One replica on its devices: everything that a pass needs, looked up once."""

    def __init__(self, work: Served, cluster: Cluster, plan: ServingPlan, p: Mapping[str, float]) -> None:
        self.work, self.cluster, self.plan, self.p = work, cluster, plan, p
        self.device = cluster.groups[0].device
        self.at = _rates(self.device, plan.precision, p)
        self.low = ELEMENT_BYTES[plan.precision]
        self.group: tuple[Hop, ...] = ()
        if plan.tp > 1:
            levels = {link.level: p["link"] for link in cluster.links}
            latency = {link.level: p["latency"] for link in cluster.links}
            self.group = hops(cluster, size=plan.tp, stride=1, efficiency=levels, latency=latency)

    def matmul(self, flops: float, nbytes: float, rate: float) -> tuple[float, float]:
        """(seconds, seconds that the weights' bytes alone need) of matmuls on one device."""
        compute, memory = flops / rate, nbytes / self.at.bandwidth
        return max(compute, memory) + self.p["traffic"] * min(compute, memory), memory

    def reduce(self, tokens: float) -> float:
        """Seconds of all all-reduces of a pass: in one shot where small, by ring or tree where large."""
        if self.plan.tp == 1 or not self.work.collectives:
            return 0.0
        nbytes = tokens * self.work.collective * self.plan.wide
        slow = min(hop.bandwidth for hop in self.group)
        shot = self.p["collective"] + (self.plan.tp - 1) * nbytes / slow
        return self.work.collectives * min(shot, self.p["collective"] + all_reduce(nbytes, self.group))

    def hand_on(self, tokens: float) -> float:
        """Seconds of the sends between stages in one pass."""
        if self.plan.pp == 1:
            return 0.0
        nbytes = tokens * max(self.work.collective, 1.0) * self.plan.wide
        each = send(nbytes, self.cluster, stride=self.plan.tp, count=self.plan.pp)
        return (self.plan.pp - 1) * each

    def run(self, tokens: float, scored: float, attended: float, cached: float) -> dict[str, float]:
        """Seconds of one pass through all stages, by part.

        `tokens` (samples) pass, `scored` of them reach the output projection, attention takes `attended` FLOP, `cached`
        elements of keys and values are read from memory.
        """
        w, plan, at = self.work, self.plan, self.at
        t = plan.tp
        body, body_bytes = self.matmul(tokens * w.flops / t, w.matmul_weights * self.low / t, at.matmul)
        head, head_bytes = self.matmul(scored * w.head_flops / t, w.head_weights * plan.wide / t, at.wide)
        weights, total = body_bytes + head_bytes, body + head
        if w.experts is not None:
            nbytes = w.experts.weights * w.experts.touched(tokens) * self.low / t
            seconds, memory = self.matmul(tokens * w.experts.flops / t, nbytes, at.matmul)
            weights, total = weights + memory, total + seconds
        cache_share = max(1 / t, 1 / w.cache_heads) if w.cached else 1 / t
        cache = max(cached * plan.cache_bytes * cache_share / at.cache, 0.0)
        attention = attended / t / (at.wide * self.p["attention"])
        moved = tokens * (w.plain * self.p["fusion"] + w.looked_up) * plan.wide / t
        return {
            "weights": min(weights, total),
            "compute": max(0.0, total - weights),
            "cache": max(cache, attention),
            "plain": moved / at.bandwidth,
            "launch": w.kernels * self.p["kernel"],
            "communication": self.reduce(tokens) + self.hand_on(tokens),
            "step": self.p["step"],
        }

    def decode(self, batch: float, load: Load) -> dict[str, float]:
        """Seconds by part until each of `batch` sequences, half of its reply made, has one more token."""
        w = self.work
        rows = batch / self.plan.pp
        # A decoder keeps its prompt in its own cache, an encoder-decoder in that of the attention to its encoder.
        own = load.output_tokens / 2 + (0 if w.encoder else load.input_tokens)
        attended = rows * (own * w.attention_flops + load.input_tokens * w.cross_flops)
        return self.run(rows, rows, attended, rows * (own * w.cached + load.input_tokens * w.cross_cached))

    def prefill(self, prompts: float, length: float) -> dict[str, float]:
        """Seconds by part until `prompts` of `length` tokens are in the cache, in chunks; on every stage at once."""
        tokens = prompts * length
        if self.work.encoder is not None:
            return self.encode(prompts, length)
        passes = max(1.0, tokens / CHUNK)
        size = tokens / passes
        one = self.run(size, size / length, size * length / 2 * self.work.attention_flops, 0.0)
        return {name: passes * seconds for name, seconds in one.items()}

    def encode(self, prompts: float, length: float) -> dict[str, float]:
        """Seconds by part of the encoder over `prompts` of `length` positions, of which each attends to all."""
        assert self.work.encoder is not None
        inner = copy.copy(self)
        inner.work = self.work.encoder
        tokens = prompts * length
        passes = max(1.0, tokens / CHUNK)
        one = inner.run(tokens / passes, 0.0, tokens / passes * length * inner.work.attention_flops, 0.0)
        return {name: passes * seconds for name, seconds in one.items()}

    def memory(self, batch: float, load: Load) -> ServingMemory:
        """Bytes on one device of `batch` sequences."""
        w, plan = self.work, self.plan
        devices = plan.tp * plan.pp
        experts = w.experts.weights if w.experts else 0.0
        inner = w.encoder.matmul_weights if w.encoder else 0.0
        weights = (w.matmul_weights + inner + experts) * self.low + (w.head_weights + w.other_weights) * plan.wide
        share = max(1 / plan.tp, 1 / w.cache_heads) / plan.pp
        kept = load.length * w.cached
        if w.encoder is not None:
            kept = load.output_tokens * w.cached + load.input_tokens * w.cross_cached
        cache = batch * kept * plan.cache_bytes * share
        tokens = min(CHUNK, max(1, load.input_tokens) * batch) if w.decodes and load.output_tokens else batch
        widest = max(w.widest, w.encoder.widest) if w.encoder else w.widest
        activations = (tokens * (widest / plan.tp + 2 * w.collective) + batch * w.outputs / plan.tp * 2) * plan.wide
        weights /= devices
        return ServingMemory(weights=weights, cache=cache, activations=activations)


def room(device: Device) -> float | None:
    """Bytes of a device that serving may use; None where its memory is not known."""
    return None if device.memory_bytes is None else USABLE * device.memory_bytes


def _largest_batch(replica: _Replica, load: Load, limit: float | None) -> int:
    """Sequences that fit; 0 where not even one does."""
    if limit is None:
        return LARGEST_BATCH
    low, high = 0, 1 << 20
    while low < high:
        middle = (low + high + 1) // 2
        if replica.memory(middle, load).total <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def estimate_serving(
    work: Served, cluster: Cluster, plan: ServingPlan, load: Load, *, software: str = "", batch: int | None = None
) -> ServingEstimate:
    """What `plan` gives on `cluster` (the devices of one replica are enough: replicas do not meet).

    `batch` 0 or `plan.batch` above what fits is not cut: `fits` says so.

    Raises:
        PlanError: the cluster has fewer devices than one replica.
        HardwareError: a figure that is needed is not known.
    """
    if plan.tp * plan.pp > cluster.devices:
        raise PlanError(
            f"serving plan: {plan.spec()} needs {plan.tp * plan.pp} devices a replica, {cluster.name} has {cluster.devices}",
            hint="lower tp or pp, or take a larger cluster",
        )
    p = parameters_for(cluster.groups[0].device, software)
    replica = _Replica(work, cluster, plan, p)
    limit = room(replica.device)
    count = batch or plan.batch
    if work.decodes and load.output_tokens:
        parts = replica.decode(count, load)
        decode = sum(parts.values())
        # Chunks of prompts fill the stages of a pipeline side by side.
        beside = min(plan.pp, max(1.0, count * load.input_tokens / CHUNK))
        prefill = sum(replica.prefill(count, load.input_tokens).values()) / beside
        cycle = load.output_tokens * decode + prefill
        throughput = count * load.output_tokens / cycle
        latency, first_parts = cycle / load.output_tokens, replica.prefill(1, load.input_tokens)
        each = work.flops + work.head_flops + (work.experts.flops if work.experts else 0.0)
        flops = (
            each + load.input_tokens / load.output_tokens * (work.encoder.flops if work.encoder else each)
        ) * throughput
        if work.encoder is not None:  # the prompt's pass makes no token yet
            first_parts["decode"] = sum(replica.decode(1, load).values())
    else:
        parts = first_parts = _forward(replica, count, load)
        latency = decode = sum(parts.values())
        throughput = count / (decode / plan.pp if plan.pp > 1 else decode)
        flops = _sample_flops(work, load) * throughput
    peak = replica.device.peak(plan.precision) * plan.tp * plan.pp
    return ServingEstimate(
        plan=plan,
        load=load,
        throughput=throughput * plan.replicas,
        latency=latency,
        first_token=sum(first_parts.values()),
        decode=decode,
        parts=parts,
        first_parts=first_parts,
        memory=replica.memory(count, load),
        memory_limit=limit,
        largest_batch=_largest_batch(replica, load, limit),
        mfu=flops / peak,
    )


def _forward(replica: _Replica, samples: int, load: Load) -> dict[str, float]:
    """Parts of a plain forward of `samples`; a model that could decode is run on its captured (or the stated) length."""
    w = replica.work
    if not w.decodes:
        return replica.run(samples, samples, samples * w.attention_flops, 0.0)
    length = load.input_tokens or w.length
    if w.encoder is None:
        return replica.run(samples * length, samples * length, samples * length * length / 2 * w.attention_flops, 0.0)
    inside = load.input_tokens or w.encoder.length
    attended = w.length * w.length / 2 * w.attention_flops + w.length * inside * w.cross_flops
    parts = replica.run(samples * w.length, samples * w.length, samples * attended, 0.0)
    return {**parts, "encoder": sum(replica.encode(samples, inside).values())}


def _sample_flops(work: Served, load: Load) -> float:
    if work.encoder is not None:
        inside, length = load.input_tokens or work.encoder.length, work.length
        return inside * work.encoder.flops + length * (work.flops + work.head_flops + inside * work.cross_flops)
    length = (load.input_tokens or work.length) if work.decodes else 1
    pairs = length * length if work.decodes else 1
    each = work.flops + work.head_flops + (work.experts.flops if work.experts else 0.0)
    return length * each + pairs * work.attention_flops


def batches(largest: int) -> list[int]:
    """Batch sizes worth a look: powers of two and the largest."""
    top = min(largest, LARGEST_BATCH)
    sizes = [1 << i for i in range(max(1, top).bit_length()) if 1 << i <= top]
    return sorted({*sizes, top}) if top >= 1 else []
