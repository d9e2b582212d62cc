"""Which architectures tensor parallelism gets right, and how much of them it splits.

    python benchmarks/tensor_parallel_sweep.py [--tp 2] [TYPE ...]

Each small model is captured, lowered for every rank of a gloo group, and one step is compared with the unmodified
model: loss and every gradient by norm, whole parameters bit for bit between ranks. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "run" / "shard"))

import harness

TYPES = [
    "gpt2",
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "phi3",
    "bloom",
    "opt",
    "gpt_neox",
    "mixtral",
    "mamba",
    "bert",
    "roberta",
    "t5",
    "bart",
    "vit",
    "convnext",
    "swin",
    "wav2vec2",
    "falcon",
    "gptj",
    "codegen",
    "gpt_neo",
    "stablelm",
    "olmo",
    "olmo2",
    "cohere",
    "starcoder2",
    "granite",
    "glm",
    "glm4",
    "nemotron",
    "persimmon",
    "qwen2",
    "gemma",
    "gemma3_text",
    "phi",
    "smollm3",
    "exaone4",
    "granitemoe",
    "qwen2_moe",
    "olmoe",
    "deepseek_v3",
    "qwen3_moe",
    "xglm",
    "biogpt",
    "mamba2",
    "mpt",
    "gpt_bigcode",
    "ctrl",
    "gpt_oss",
    "electra",
    "albert",
    "mpnet",
    "deberta-v2",
    "ernie",
    "camembert",
    "roformer",
    "convbert",
    "nystromformer",
    "megatron-bert",
    "mobilebert",
    "modernbert",
    "xlm-roberta",
    "distilbert",
    "fnet",
    "esm",
    "beit",
    "dinov2",
    "resnet",
    "regnet",
    "convnextv2",
    "whisper",
    "hubert",
    "mbart",
    "pegasus",
    "marian",
    "mt5",
    "m2m_100",
    "deit",
    "squeezebert",
    "xlnet",
    "helium",
    "arcee",
    "ernie4_5",
    "hunyuan_v1_dense",
    "seed_oss",
    "rwkv",
    "recurrent_gemma",
    "phimoe",
    "lfm2",
]


def counts(found: dict[str, int]) -> str:
    """All-reduces and all-gathers of one pass."""
    return f"{found.get('all_reduce', 0)} + {found.get('all_gather', 0)}"


def line(case: str, outcomes: list[Any]) -> str:
    """One row of the table."""
    problem = next((o.problem for o in outcomes if o.problem), "")
    if problem:
        return f"| {case} | failed | | | | | {problem.strip().splitlines()[-1][:90]} |"
    worst = max(outcomes, key=lambda o: o.gradient_error)
    verdict = "exact" if all(o.is_exact for o in outcomes) else f"WRONG {worst.worst}"
    return (
        f"| {case} | {verdict} | {worst.gradient_error:.1e} | {worst.sharded:.0%} | {counts(worst.forward)} "
        f"| {counts(worst.backward)} | {'; '.join(w.split(':')[0].split('.', 1)[-1] for w in worst.whole[:3])} |"
    )


def main() -> None:
    """Run the cases one after the other in processes that stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("types", nargs="*", default=TYPES)
    options = parser.parse_args()
    print("| type | result | worst gradient | parameters split | forward reduce + gather | backward | whole |")
    print("|---|---|---|---|---|---|---|")
    workers = harness.Workers(options.tp)
    for kind in options.types:
        case = kind if kind.startswith("model:") else f"hf:{kind}"
        try:
            print(line(kind, workers.run(case.removeprefix("model:"), timeout=240)), flush=True)
        except TimeoutError as problem:
            print(f"| {kind} | failed | | | | | {str(problem).strip().splitlines()[-1][:90]} |", flush=True)
            workers = harness.Workers(options.tp)
    workers.close()


if __name__ == "__main__":
    main()
