"""How much there is to do: tokens and batch, given or a default that says why."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from plait.advice.needs import Needs
from plait.schema.graph import Graph
from plait.schema.records import Record
from plait.units import format_count

__all__ = ["Work", "as_samples", "work_of"]

_CHINCHILLA = 20  # tokens a parameter: Hoffmann et al. (2022), arXiv 2203.15556, table 3
# (parameters up to, tokens of a batch, who did so): Brown et al. (2020), arXiv 2005.14165, table 2.1; Touvron et al.
# (2023), arXiv 2307.09288, section 2.2; Llama team (2024), arXiv 2407.21783, section 3.4.1.
_BATCHES = (
    (0.8e9, 0.5e6, "GPT-3's smaller models"),
    (4e9, 1e6, "GPT-3's smaller models"),
    (14e9, 2e6, "GPT-3's smaller models"),
    (100e9, 4e6, "Llama 2"),
    (math.inf, 16e6, "Llama 3 405B"),
)
_IMAGENET = 1_281_167 * 90  # samples: 90 passes over ImageNet-1k, a usual recipe of image classifiers
# One pass over Criteo's click logs but for their last day, in batches of 16,384: the DLRM that PyTorch's recommender library
# ships (github:facebookresearch/dlrm, torchrec_dlrm/README).
_CRITEO, _CRITEO_BATCH = 4_195_197_692, 16_384
_ALPACA = 52_002 * 3  # samples: 3 passes over Alpaca's 52,002 instructions (Taori et al. 2023)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work(Record):
    """What a run has to get through."""

    tokens: float
    """Positions, or samples where a sample has no sequence."""
    unit: str
    batch: int
    """Samples of a step."""
    tokens_why: str
    batch_why: str


def as_samples(graph: Graph) -> Graph:
    """`graph` itself where positions are a sequence, else with one position a sample.

    An integer input of two dimensions may hold one category a column (a recommender's): a sequence is one whose positions are
    looked up in the same table.
    """
    if graph.tokens_per_sample <= 1:
        return graph
    lookups = (op for s in graph.segments for op in s.operators if op.kind == "embedding")
    if any(graph.tokens_per_sample in x.shape[1:] for op in lookups for x in op.inputs):
        return graph
    return replace(graph, tokens_per_sample=1)


def _is_mostly_tables(graph: Graph) -> bool:
    """Whether most parameters are looked up."""
    names = {n for s in graph.segments for op in s.operators if op.kind == "embedding" for n in op.parameters}
    return 2 * sum(spec.numel for spec in graph.parameters if spec.name in names) > graph.numel


def work_of(graph: Graph, needs: Needs, own_batch: int) -> Work:
    """Tokens and batch of the run."""
    has_sequence = graph.tokens_per_sample > 1
    unit = "tokens" if has_sequence else "samples"
    if needs.tokens is not None:
        tokens, tokens_why = needs.tokens, "as given by --tokens"
    elif needs.task == "finetune":
        tokens = float(_ALPACA * graph.tokens_per_sample)
        tokens_why = "default: 3 passes over 52,002 samples, as Alpaca did, each of the job's own length"
    elif has_sequence:
        tokens = float(_CHINCHILLA * graph.numel)
        tokens_why = f"default: {_CHINCHILLA} tokens for each of {format_count(graph.numel)} parameters (Chinchilla, arXiv 2203.15556)"
    elif _is_mostly_tables(graph):
        tokens, tokens_why = float(_CRITEO), "default: one pass over Criteo's 4.2 billion clicks, as DLRM"
    else:
        tokens, tokens_why = (
            float(_IMAGENET),
            "default: 90 passes over 1.28 million samples, as image classifiers on ImageNet",
        )
    if needs.batch is not None:
        batch, batch_why = needs.batch, "as given by --batch"
    elif needs.task == "finetune":
        batch, batch_why = 128, "default: 128 samples, as Alpaca"
    elif has_sequence:
        wanted, who = next((size, who) for limit, size, who in _BATCHES if graph.numel <= limit)
        batch = max(1, 1 << round(wanted / graph.tokens_per_sample).bit_length() - 1)
        batch_why = (
            f"default: {format_count(batch * graph.tokens_per_sample)} tokens, a power of two of samples at most "
            f"{format_count(wanted)} as {who} took"
        )
    elif _is_mostly_tables(graph):
        batch, batch_why = _CRITEO_BATCH, "default: 16,384 samples, as DLRM on Criteo"
    else:
        batch, batch_why = max(256, own_batch), "default: 256 samples, or the job's own batch where that is larger"
    return Work(tokens=tokens, unit=unit, batch=batch, tokens_why=tokens_why, batch_why=batch_why)
