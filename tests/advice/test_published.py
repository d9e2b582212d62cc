"""Accelerator hours of public training runs, against the best plan on as many accelerators.

Published hours include what a plan cannot know: restarts, evaluation, older software. Where a report does not say how many
accelerators or how large a batch, the case says what was assumed.
"""

from __future__ import annotations

import pytest

from plait.advice.hunt import few_plans
from plait.cost.architecture import Architecture, build_graph
from plait.hardware.clusters import named_cluster
from plait.plan.search import search


def llama(layers, hidden, ffn, heads, kv_heads, vocab, seq_len, **more):
    values = {"head_dim": hidden // heads, **more}
    return Architecture(
        name="llama", layers=layers, hidden=hidden, ffn_hidden=ffn, heads=heads, kv_heads=kv_heads, vocab=vocab, seq_len=seq_len,
        **values,
    )  # fmt: skip


def missed(why):
    return pytest.mark.xfail(strict=True, reason=why)


BLOOM = Architecture(
    name="bloom", layers=70, hidden=14336, ffn_hidden=57344, heads=112, kv_heads=112, head_dim=128, vocab=250880,
    seq_len=2048, gated=False, tied=True, bias=True,
)  # fmt: skip

RUNS = [
    # arXiv 2302.13971, section 2.4 and table 15: 65B on 2,048 A100, batch 4M tokens, 1.4T tokens; 7B: 1T (1,024 assumed)
    pytest.param(llama(80, 8192, 22016, 64, 64, 32000, 2048), "2048xA100-SXM-80GB", 2048, 1.4e12, 1_022_362, id="LLaMA-65B"),
    pytest.param(llama(32, 4096, 11008, 32, 32, 32000, 2048), "1024xA100-SXM-80GB", 2048, 1.0e12, 82_432, id="LLaMA-7B"),
    # as above, table 15: 13B on 1.0T tokens, 33B (32.5) on 1.4T (1,024 and 2,048 assumed)
    pytest.param(llama(40, 5120, 13824, 40, 40, 32000, 2048), "1024xA100-SXM-80GB", 2048, 1.0e12, 135_168, id="LLaMA-13B"),
    pytest.param(llama(60, 6656, 17920, 52, 52, 32000, 2048), "2048xA100-SXM-80GB", 2048, 1.4e12, 530_432, id="LLaMA-33B"),
    # arXiv 2307.09288, tables 1 and 2: batch 4M tokens, 2T tokens (2,048 and 1,024 A100 assumed: "up to 2000")
    pytest.param(llama(80, 8192, 28672, 64, 8, 32000, 4096), "2048xA100-SXM-80GB", 1024, 2e12, 1_720_320, id="Llama-2-70B"),
    pytest.param(llama(32, 4096, 11008, 32, 32, 32000, 4096), "1024xA100-SXM-80GB", 1024, 2e12, 184_320, id="Llama-2-7B"),
    pytest.param(llama(40, 5120, 13824, 40, 40, 32000, 4096), "1024xA100-SXM-80GB", 1024, 2e12, 368_640, id="Llama-2-13B"),
    # model card of Llama 3.1: 30.84M H100 hours; arXiv 2407.21783: 16,384 H100, 15.6T tokens, batch 16M tokens
    pytest.param(llama(126, 16384, 53248, 128, 8, 128256, 8192), "16384xH100-SXM", 2048, 15.6e12, 30.84e6, id="Llama-3.1-405B"),
    # arXiv 2211.05100, section 3.4.1: 384 A100, batch 2,048, 366B tokens
    pytest.param(
        BLOOM, "384xA100-SXM-80GB", 2048, 366e9, 1_082_990, id="BLOOM",
        marks=missed("44 % too few: 2022 software, fp32-scaled softmax, restarts over 3.5 months"),
    ),
    # github:jzhang38/TinyLlama README: 3,456 A100 40GB hours for 300B tokens on 16, batch 2M tokens
    pytest.param(
        llama(22, 2048, 5632, 32, 4, 32000, 2048, head_dim=64), "16xA100-SXM-40GB", 1024, 3e11, 3_456, id="TinyLlama-1.1B"
    ),
    # https://huggingface.co/blog/falcon-180b: up to 4,096 A100 40GB, about 7,000,000 hours, 3.5T tokens (batch 4M assumed)
    pytest.param(
        llama(80, 14848, 59392, 232, 8, 65024, 2048, head_dim=64, gated=False, tied=True), "4096xA100-SXM-40GB", 2048, 3.5e12,
        7.0e6, id="Falcon-180B",
    ),
    # https://engineered.at/articles/minipost-olmo-3-training-cost: hours with restarts, from the published logs; tokens, 1,024
    # H100 and batches of 4M and 8M tokens from the report of Olmo 3 (its sliding windows count as full attention here)
    pytest.param(llama(32, 4096, 11008, 32, 32, 100278, 8192), "1024xH100-SXM", 512, 5.93e12, 234e3, id="Olmo-3-7B"),
    pytest.param(
        llama(64, 5120, 27648, 40, 8, 100278, 8192, head_dim=128), "1024xH100-SXM", 1024, 5.5e12, 1.05e6, id="Olmo-3-32B"
    ),
    # https://www.databricks.com/blog/mpt-7b: 9.5 days on 440 A100 40GB, 1T tokens
    pytest.param(
        llama(32, 4096, 16384, 32, 32, 50432, 2048, gated=False, tied=True), "440xA100-SXM-40GB", 1760, 1e12, 100_320, id="MPT-7B",
        marks=missed("29 % too few: 54 % of peak is advised, the run reached about 38 %"),
    ),
    # arXiv 2204.06745, sections 3.2 and 4: 1,830 hours on 96 A100 40GB, batch 3.15M tokens, 150,000 steps, fp16
    pytest.param(
        llama(44, 6144, 24576, 64, 64, 50432, 2048, head_dim=96, gated=False, bias=True), "96xA100-SXM-40GB", 1536, 472e9, 175_680,
        id="GPT-NeoX-20B", marks=missed("44 % too few: 2021 software without fused attention, 117 TFLOP/s as reported"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "cluster", "batch", "tokens", "published"), RUNS)
def test_hours_of_a_public_run_are_within_a_quarter(model, cluster, batch, tokens, published):
    """Accelerators x tokens / (tokens per second) / 3600, as the answer's hours are."""
    graph, where = build_graph(model), named_cluster(cluster)
    found = search(graph, where, batch=batch, precision="bf16", top=1, space=few_plans(graph, where.devices)).estimate
    hours = where.devices * tokens / found.tokens_per_s / 3600

    assert hours == pytest.approx(published, rel=0.25)
