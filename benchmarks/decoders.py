"""Which of transformers' causal language models decode with a cache that is derived from their forward.

    python benchmarks/decoders.py [-o decoders.json] [TYPE ...]

Each type is built small (two layers, hidden size 64) with moved random weights, in a process of its own with a time limit; 64 tokens are
generated greedily by prefill and decode, and the model itself runs once over what was written (`plait.serve.decoding.decode.prove`).

    equal       logits within 1e-4 of the model's own (relative to the largest), every token the same
    near        logits within 1e-4, and a token that differs
    refused     with the reason
    not built   the small config does not fit the type
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import architectures
import torch

from plait.errors import PlaitError

CAPACITY, LIMIT, LARGEST = 96, 90, 60_000_000

_SMALL: dict[str, Any] = {
    **architectures.SMALL,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embed_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "moe_intermediate_size"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "shared_expert_intermediate_size"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("head_dim", "d_kv", "sliding_window", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups"), 1),
}
_LATENT = "num_key_value_heads=4&kv_lora_rank=16&q_lora_rank=16&qk_rope_head_dim=8&qk_nope_head_dim=8&v_head_dim=8"
_MORE: dict[str, str] = {
    **{k: v for k, v in architectures.MORE.items() if k not in ("gemma2", "mistral")},
    **dict.fromkeys(("gptj", "codegen"), "rotary_dim=8"),
    **dict.fromkeys(("axk2", "minicpm3", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("axk1", "deepseek_v3", "longcat_flash", "youtu"), f"{_LATENT}&head_dim=8"),
    "deepseek_v2": f"{_LATENT}&num_experts_per_tok=2&n_group=1&topk_group=1",
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), "head_dim=16"),
    "nemotron": "num_key_value_heads=2",
    "mamba2": "num_heads=8&head_dim=16&state_size=4&chunk_size=8&n_groups=2&expand=2&hidden_size=64",
    "gemma3n_text": "num_kv_shared_layers=0&vocab_size_per_layer_input=99&num_hidden_layers=5",
    "gemma4_text": "vocab_size_per_layer_input=99&num_kv_shared_layers=0",
    "gemma4": "text_config.vocab_size_per_layer_input=99&text_config.num_kv_shared_layers=0",
    "jamba": "attn_layer_period=2&attn_layer_offset=1",
    "reformer": "axial_pos_embds_dim=16,48&axial_pos_shape=8,16",
    "dots1": "n_routed_experts=4&num_experts_per_tok=2&n_shared_experts=1&n_group=1&topk_group=1",
}


def tried(model_type: str) -> dict[str, Any]:
    """What came of one type."""
    from plait.serve.decoding.decode import with_cache
    from plait.serve.perturb import perturb
    from plait.serve.source import eval_mode, source_of

    found: dict[str, Any] = {"type": model_type}
    try:
        found["target"] = architectures.small(model_type, _SMALL, _MORE, is_decoder=True)
        source = source_of(found["target"])
        if sum(p.numel() for p in source.module.parameters()) > LARGEST:
            return {
                **found,
                "status": "not built",
                "why": "too large: it has sizes that the small config does not name",
            }
        perturb(source.module.state_dict())
        inputs = source.serving_job.batch[0]
    except Exception as problem:
        return {**found, "status": "not built", "why": _without_folders(str(problem))}
    begin = time.perf_counter()
    try:
        with eval_mode(source.module):
            derived, proof = with_cache(source.module, inputs, capacity=CAPACITY, most=2)
    except PlaitError as problem:
        return {**found, "status": "refused", "why": _without_folders(problem.message)}
    except Exception as problem:
        return {**found, "status": "failed", "why": _without_folders(f"{type(problem).__name__}: {problem}")}
    return {
        **found,
        "status": "equal" if proof.first_difference is None else "near",
        "max_rel": proof.max_rel,
        "tokens": proof.tokens,
        "caches": [list(cache.shape) for cache in derived.caches],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _without_folders(text: str) -> str:
    """Where packages are installed is nobody's business."""
    return re.sub(r"/[^\s\"']*/site-packages/", "", text)[:600]


def in_child(model_type: str, part: Path) -> dict[str, Any]:
    """`tried` in a process of its own, which may crash or take too long."""
    part.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)  # ends the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        part.write_text(json.dumps(tried(model_type)), encoding="utf-8")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status or not part.exists():
        late = os.waitstatus_to_exitcode(status) == -signal.SIGALRM
        why = f"not done within {LIMIT} s" if late else f"the process ended with status {status}"
        return {"type": model_type, "status": "failed", "why": why}
    found: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Try the types, keep the rows, and print one line of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "decoders.json")
    given = parser.parse_args()
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    if given.output.exists():
        rows = {row["type"]: row for row in json.loads(given.output.read_text(encoding="utf-8"))["rows"]}
    for model_type in given.types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        row = rows[model_type] = in_child(model_type, given.output.with_suffix(".part"))
        print(row["type"], row["status"], row.get("max_rel", row.get("why", "").replace("\n", " ")[:150]), flush=True)
        held = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "counts": dict(Counter(row["status"] for row in rows.values())),
            "rows": [rows[name] for name in sorted(rows)],
        }
        given.output.write_text(json.dumps(held, indent=1), encoding="utf-8")
    given.output.with_suffix(".part").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
