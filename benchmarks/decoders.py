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
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import architectures
import torch

from plait.capture.trace import call_model
from plait.errors import PlaitError

if TYPE_CHECKING:
    from plait.serve.source import Source

CAPACITY, LIMIT, LARGEST = 96, 150, 60_000_000

_SMALL: dict[str, Any] = {
    **architectures.SMALL,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embed_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "moe_intermediate_size"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "shared_expert_intermediate_size"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("head_dim", "d_kv", "q_lora_rank", "kv_lora_rank", "index_head_dim"), 16),
    # Windows that are shorter than what is generated, so that they matter.
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 16),
    **dict.fromkeys(("local_attention", "attention_chunk_size", "index_topk", "keep_window_size"), 16),
    "mamba_chunk_size": 16,
    "index_n_heads": 32,  # few heads of rectified scores give ties, which no cache is told from
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups"), 1),
}
_LATENT = "num_key_value_heads=4&kv_lora_rank=16&q_lora_rank=16&qk_rope_head_dim=8&qk_nope_head_dim=8&v_head_dim=8"
_MORE: dict[str, str] = {
    **{k: v for k, v in architectures.MORE.items() if k not in ("gemma2", "mistral")},
    **dict.fromkeys(("gptj", "codegen"), "rotary_dim=8"),
    **dict.fromkeys(("axk2", "minicpm3", "glm4_moe_lite", "deepseek_v32", "glm_moe_dsa", "hy_v4"), _LATENT),
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
    "kimi_linear": "linear_head_dim=16&linear_num_heads=4",
    "lfm2_moe": 'layer_types=["full_attention","conv"]',
    "dbrx": 'attn_config={"kv_n_heads":2,"rope_theta":10000.0}',
    "blt": "encoder_hash_byte_group_vocab=1000",
    "dots3_note": "vision_config.num_hidden_layers=42",
    "cohere_compass_text": 'rope_parameters={"full_attention":{"rope_type":"default","rope_theta":1e4,"mrope_section":[4,2,2]}}',
    "dots1": "n_routed_experts=4&num_experts_per_tok=2&n_shared_experts=1&n_group=1&topk_group=1",
}


def small(model_type: str) -> tuple[str, Source]:
    """The target and what it makes: the type small, with a layer of every kind that it has where the small config takes that; moved weights; it runs."""
    stated = _MORE.get(model_type, "")
    kinds = every_kind(model_type)
    if kinds:
        with suppress(Exception):
            return _running(model_type, "&".join([f"{key}={value}" for key, value in kinds.items()] + [stated]))
    return _running(model_type, stated)


def every_kind(model_type: str) -> dict[str, str]:
    """Keys of a config for as few layers as have all kinds of attention and of feed-forward of the type's own config."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    found: dict[str, str] = {}
    for prefix, part in (("", config), ("text_config.", getattr(config, "text_config", None))):
        keys = ("layer_types", "mlp_layer_types")
        lists = {key: list(dict.fromkeys(getattr(part, key, None) or ())) for key in keys}
        count = max(2, *map(len, lists.values()))
        for key, kinds in lists.items():
            if kinds:
                found[prefix + key] = json.dumps((kinds + kinds[-1:] * count)[:count], separators=(",", ":"))
                found[f"{prefix}num_hidden_layers"] = str(count)
    return found


def _running(model_type: str, more: str) -> tuple[str, Source]:
    from plait.serve.perturb import perturb
    from plait.serve.source import eval_mode, source_of

    target = architectures.small(model_type, _SMALL, {model_type: more}, is_decoder=True)
    source = source_of(target)
    if sum(p.numel() for p in source.module.parameters()) > LARGEST:
        raise ValueError("too large: it has sizes that the small config does not name")
    perturb(source.module.state_dict())
    inputs = source.serving_job.batch[0]
    with eval_mode(source.module):
        call_model(source.module, inputs)
    return target, source


def tried(model_type: str) -> dict[str, Any]:
    """What came of one type."""
    from plait.serve.decoding.decode import with_cache
    from plait.serve.source import eval_mode

    found: dict[str, Any] = {"type": model_type}
    try:
        found["target"], source = small(model_type)
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
