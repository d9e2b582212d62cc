"""A table's row as something to predict: architecture, cluster, plan, batch; what was filled in is said."""

from __future__ import annotations

import csv
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.cost.architecture import Architecture, LatentAttention, count_parameters
from plait.cost.calibration import Calibration, Software, software_for
from plait.cost.table import Row
from plait.errors import PlaitError
from plait.hardware.catalogue import find
from plait.hardware.clusters import uniform_cluster
from plait.schema.cluster import Cluster
from plait.schema.plan import Plan

__all__ = ["Case", "SkipRow", "case_of"]

_PRECISIONS = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "fp32": "fp32",
    "tf32": "fp32",
    "fp8": "fp8",
    "mxfp8": "fp8",
    "nvfp4": "fp4",
    "mxfp4": "fp4",
    "fp4": "fp4",
}
_ZERO = {"none": 0, "ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3, "hsdp": 3}


class SkipRow(Exception):  # noqa: N818 - a skipped row is no error
    """A row that cannot be predicted, with the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row, completed."""

    row: Row
    architecture: Architecture
    cluster: Cluster
    plan: Plan
    batch: int
    software: Software
    open_recompute: bool
    """The row does not say what is recomputed: the least that fits is taken."""
    filled: tuple[str, ...]
    """What the row left out and what was taken instead."""


def case_of(row: Row, calibration: Calibration) -> Case:
    """The row, completed.

    Raises:
        SkipRow: something is missing that cannot be filled in.
    """
    filled: list[str] = []
    if not row.text("accelerator") and not row.text("accelerator_as_printed"):
        raise SkipRow("accelerator is not given")
    try:
        part = find(row.text("accelerator") or row.text("accelerator_as_printed"))
    except PlaitError as problem:
        raise SkipRow(problem.message) from None
    precision = _precision(row, filled, part.device.peak_flops)
    software = software_for(row.text("source") or row.id, part.device, precision, calibration)
    architecture = _architecture(row, software, filled)
    plan, batch = _plan(row, architecture, precision, software, filled)
    count = plan.devices
    per_node = row.whole("nodes_gpus_per_node")
    try:
        cluster = uniform_cluster(part, count, per_node=per_node, inter_node=_inter_node(row, per_node or 8))
    except PlaitError as problem:
        raise SkipRow(problem.message) from None
    open_recompute = not row.text("activation_recompute")
    return Case(
        row=row,
        architecture=architecture,
        cluster=cluster,
        plan=plan,
        batch=batch,
        software=software,
        open_recompute=open_recompute,
        filled=tuple(filled),
    )


def _precision(row: Row, filled: list[str], peaks: dict[str, float]) -> str:
    text = row.text("precision").lower()
    if not text:
        choice = "bf16" if "bf16" in peaks else "fp16"
        filled.append(f"precision {choice}")
        return choice
    if text not in _PRECISIONS:
        raise SkipRow(f"precision {text!r} is not known")
    return _PRECISIONS[text]


def _needed(row: Row, name: str) -> int:
    value = row.whole(name)
    if value is None:
        raise SkipRow(f"{name} is not given")
    return value


@functools.cache
def _vocabularies() -> tuple[tuple[str, int], ...]:
    path = Path(__file__).parent / "data" / "vocabularies.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return tuple((cells["pattern"], int(cells["vocab"])) for cells in csv.DictReader(file))


def _noted(row: Row, pattern: str) -> int | None:
    found = re.search(pattern, row.text("notes"))
    return int(found[1]) if found else None


def _architecture(row: Row, software: Software, filled: list[str]) -> Architecture:
    layers, hidden, seq_len = (_needed(row, name) for name in ("layers", "hidden", "seq_len"))
    name = row.text("model_name") or row.id
    heads = row.whole("heads")
    if heads is None:
        heads = max(1, hidden // 128)
        filled.append(f"heads {heads} (128 wide)")
    head_dim = _noted(row, r"head_dim (\d+)") or max(1, hidden // heads)
    kv_heads = row.whole("kv_heads")
    if kv_heads is None:
        kv_heads = heads
        filled.append(f"kv_heads {heads} (as heads)")
    vocab = row.whole("vocab")
    if vocab is None:
        vocab = next(size for pattern, size in _vocabularies() if re.search(pattern, name, re.IGNORECASE))
        filled.append(f"vocab {vocab} (model family)")
    ffn = row.whole("ffn_hidden")
    known_ffn = ffn
    experts = row.whole("moe_experts") or 0
    topk = row.whole("moe_topk") or (1 if experts else 0)
    base = Architecture(
        name=name, layers=layers, hidden=hidden, ffn_hidden=ffn or 4 * hidden, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, vocab=vocab, seq_len=seq_len, fused_attention=software.fused_attention,
        experts=experts if experts > 1 else 0, topk=topk if experts > 1 else 0,
        expert_ffn=(_noted(row, r"moe_ffn (\d+)") or ffn or 4 * hidden) if experts > 1 else 0,
        dense_layers=_noted(row, r"first (\d+) layers? dense") or 0,
        latent=LatentAttention() if "MLA" in row.text("notes") else None,
        shared_ffn=(_noted(row, r"moe_ffn (\d+)") or 0) if "MLA" in row.text("notes") else 0,
    )  # fmt: skip
    if base.latent:
        filled.append("latent attention and one shared expert as in DeepSeek-V3")
    chosen = _gated(row, base, known_ffn, filled)
    if not chosen.gated and software.dropout:
        chosen = _with(chosen, dropout=True)
    return chosen


def _with(a: Architecture, **changes: object) -> Architecture:
    return Architecture(**{**{name: getattr(a, name) for name in Architecture.__dataclass_fields__}, **changes})


def _gated(row: Row, base: Architecture, ffn: int | None, filled: list[str]) -> Architecture:
    """Gated or not, tied or not: whichever comes nearest to the stated parameters."""
    hidden = base.hidden
    if "mlp_ratio 8/3" in row.text("notes") and ffn is None:
        filled.append("gated MLP of 8/3 hidden (notes)")
        return _with(base, gated=True, ffn_hidden=256 * math.ceil(8 * hidden / 3 / 256))
    wide = ffn if ffn is not None else 256 * math.ceil(8 * hidden / 3 / 256)
    options = []
    for gated in (True, False):
        for tied in (False, True):
            width = wide if gated else (ffn or 4 * hidden)
            a = _with(base, gated=gated, tied=tied, ffn_hidden=width, learned_positions=not gated, bias=not gated)
            options.append(a)
    stated = row.number("params_b")
    if stated is None:
        chosen = next(a for a in options if a.gated == (ffn is None or ffn != 4 * hidden or bool(base.experts)))
        filled.append(f"{'gated' if chosen.gated else 'plain'} MLP (ffn {ffn or chosen.ffn_hidden})")
        return chosen

    # A count rounded to billions cannot tell tied from untied: a clearly better match is needed to leave the usual pair.
    def distance(a: Architecture) -> float:
        usual = a.tied != a.gated
        return abs(math.log(count_parameters(a) / (stated * 1e9))) + (0.0 if usual else 0.03)

    chosen = min(options, key=distance)
    filled.append(
        f"{'gated' if chosen.gated else 'plain'} MLP, output {'tied' if chosen.tied else 'not tied'}: "
        f"{count_parameters(chosen) / 1e9:.2f} B parameters of {stated:g} B stated"
    )
    return chosen


def _degrees(row: Row) -> tuple[int, int, int, int, int]:
    """dp (all replicas), tp, pp, cp, ep."""
    if not any(row.number(name) for name in ("dp", "tp", "pp")):
        raise SkipRow("parallel degrees are not given")
    tp, pp, cp, ep = (row.whole(name) or 1 for name in ("tp", "pp", "cp", "ep"))
    count = _needed(row, "n_accelerators")
    dp = row.whole("dp")
    if dp is None:
        if count % (tp * pp * cp):
            raise SkipRow(f"tp x pp x cp = {tp * pp * cp} does not divide n_accelerators = {count}")
        dp = count // (tp * pp * cp)
    elif dp * tp * pp * cp != count:
        raise SkipRow(f"dp x tp x pp x cp = {dp * tp * pp * cp} is not n_accelerators = {count}")
    return dp, tp, pp, cp, ep


def _plan(row: Row, a: Architecture, precision: str, software: Software, filled: list[str]) -> tuple[Plan, int]:
    dp, tp, pp, cp, ep = _degrees(row)
    batch = _needed(row, "global_batch")
    interleave = row.whole("virtual_pp") or 1
    micro = row.number("micro_batch")
    if micro is None:
        micro = max(1.0, batch / dp) if pp == 1 and row.text("sharding") in ("fsdp", "hsdp", "zero3") else 1.0
        filled.append(f"micro_batch {micro:g}")
    if batch < dp:
        raise SkipRow(f"global_batch = {batch} is below dp = {dp}")
    microbatches = max(1, round(batch / dp / micro))
    fsdp, zero = _sharding(row, dp, tp, filled)
    recompute = row.text("activation_recompute").lower() or "none"
    if recompute not in ("none", "selective", "full"):
        raise SkipRow(f"activation_recompute {recompute!r} is not none, selective or full")
    stages = pp * interleave
    if stages > a.layers + 2:
        raise SkipRow(f"pp x virtual_pp = {stages} is more than the model's {a.layers} layers")
    cuts: tuple[int, ...] = ()
    if stages > 1 and a.layers % stages == 0 and not software.balanced_stages:
        each = a.layers // stages
        cuts = tuple(1 + each * s for s in range(1, stages))
    if ep > dp:
        if ep > dp * tp:
            raise SkipRow(f"ep = {ep} is more than dp x tp = {dp * tp}")
        filled.append(f"ep {dp} with experts split by tp as well: as many parts as ep {ep}")
        ep = dp
    values: dict[str, Any] = {
        "dp": dp // fsdp,
        "fsdp": fsdp,
        "tp": tp,
        "pp": pp,
        "cp": cp,
        "ep": ep,
        "zero": max(1, zero),
        "microbatches": microbatches,
        "schedule": "interleaved" if interleave > 1 else "1f1b",
        "interleave": interleave,
        "recompute": recompute,
        "precision": precision,
        "cuts": cuts,
    }
    try:
        plan = Plan(**values)
    except PlaitError as problem:
        raise SkipRow(problem.message) from None
    return plan, batch


def _sharding(row: Row, dp: int, tp: int, filled: list[str]) -> tuple[int, int]:
    """(fsdp, zero)."""
    text = row.text("sharding").lower()
    if not text:
        if dp == 1:
            return 1, 1
        filled.append("sharding zero1")
        text = "zero1"
    if text not in _ZERO:
        raise SkipRow(f"sharding {text!r} is not one of {', '.join(_ZERO)}")
    zero = _ZERO[text]
    if zero == 0:
        return 1, 1
    group = _noted(row, r"(?:zero1 group(?: size)?|FSDP group) (\d+)")
    if text == "hsdp" and group is None:
        slices = re.search(r"(\d+) slice", row.text("interconnect"))
        group = dp // int(slices[1]) if slices else max(1, (row.whole("nodes_gpus_per_node") or 8) // tp)
        filled.append(f"sharded within {group}")
    fsdp = group if group and dp % group == 0 and group <= dp else dp
    return fsdp, zero


def _inter_node(row: Row, per_node: int) -> float | None:
    """Bytes per second for each device between nodes, as the row prints it for a node."""
    text = row.text("interconnect")
    found = re.search(r"(\d+)\s*x\s*(\d+)\s*Gb", text)
    if found:
        return int(found[1]) * int(found[2]) * 1e9 / 8 / per_node
    found = re.search(r"(\d+)\s*Gbps", text)
    return int(found[1]) * 1e9 / 8 / per_node if found else None
