"""Types of transformers that the benchmarks walk through, and a small target of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMED = [
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
]
"""What docs/parity.md holds under every plan."""

WIDE = [
    "gpt_neo",
    "gptj",
    "codegen",
    "gpt_bigcode",
    "falcon",
    "mpt",
    "qwen2",
    "qwen2_moe",
    "qwen3_moe",
    "gemma",
    "gemma3_text",
    "phi",
    "stablelm",
    "starcoder2",
    "cohere",
    "olmo",
    "olmo2",
    "olmoe",
    "granite",
    "granitemoe",
    "glm",
    "glm4",
    "smollm3",
    "persimmon",
    "nemotron",
    "deepseek_v3",
    "dbrx",
    "jamba",
    "rwkv",
    "mamba2",
    "recurrent_gemma",
    "xglm",
    "biogpt",
    "ctrl",
    "openai-gpt",
    "distilbert",
    "albert",
    "electra",
    "deberta",
    "deberta-v2",
    "mobilebert",
    "convbert",
    "squeezebert",
    "funnel",
    "xlm-roberta",
    "mpnet",
    "ernie",
    "nystromformer",
    "big_bird",
    "longformer",
    "roformer",
    "xlnet",
    "fnet",
    "layoutlm",
    "flaubert",
    "modernbert",
    "esm",
    "pegasus",
    "mbart",
    "marian",
    "mt5",
    "longt5",
    "led",
    "m2m_100",
    "prophetnet",
    "fsmt",
    "switch_transformers",
    "bigbird_pegasus",
    "blenderbot",
    "plbart",
    "beit",
    "deit",
    "dinov2",
    "swinv2",
    "convnextv2",
    "resnet",
    "regnet",
    "levit",
    "mobilevit",
    "mobilenet_v2",
    "efficientnet",
    "pvt",
    "segformer",
    "poolformer",
    "focalnet",
    "cvt",
    "vit_mae",
    "hiera",
    "bit",
    "hubert",
    "wavlm",
    "unispeech",
    "sew",
    "data2vec-audio",
    "whisper",
    "speech_to_text",
    "audio-spectrogram-transformer",
    "time_series_transformer",
]
"""Further types, under fewer plans."""

TENSOR_PARALLEL_ONLY = [
    "exaone4",
    "gpt_oss",
    "camembert",
    "megatron-bert",
    "helium",
    "arcee",
    "ernie4_5",
    "hunyuan_v1_dense",
    "seed_oss",
    "phimoe",
    "lfm2",
]
"""What only the sweep of tensor parallelism adds."""

# Key of a config -> small value, wherever a type has the key (in a part of the config too).
SMALL: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "decoder_num_hidden_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("vocab_size",), 99),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
}
# What a type needs beside that: shapes that must agree with each other.
MORE: dict[str, str] = {
    "gptj": "rotary_dim=8",
    "codegen": "rotary_dim=8",
    "deepseek_v3": "kv_lora_rank=16&q_lora_rank=16&qk_rope_head_dim=8&qk_nope_head_dim=8&v_head_dim=8&n_group=2&topk_group=1&num_experts_per_tok=2&first_k_dense_replace=1",
    "qwen3_moe": "num_experts_per_tok=2",
    "olmoe": "num_experts_per_tok=2",
    "mamba2": "num_heads=8&head_dim=8&state_size=4&chunk_size=8&n_groups=2&expand=2",
    "esm": "vocab_size=99&mask_token_id=98&pad_token_id=1",
    "funnel": "block_sizes=1,1&d_model=32&d_head=8&d_inner=64",
    "longformer": "attention_window=4",
    "resnet": "embedding_size=8&hidden_sizes=16,32&depths=1,1&layer_type=basic",
    "regnet": "embedding_size=8&hidden_sizes=16,32&depths=1,1&groups_width=8",
    "levit": "hidden_sizes=32,48,64&num_attention_heads=2,2,2&depths=1,1,1&key_dim=8,8,8&image_size=64&patch_size=16",
    "efficientnet": "depth_coefficient=1.0&width_coefficient=0.1",
    "convnext": "hidden_sizes=16,32&depths=1,1&patch_size=4&image_size=64",
    "convnextv2": "hidden_sizes=16,32&depths=1,1&patch_size=4&image_size=64",
    "swin": "embed_dim=16&depths=1,2&num_heads=2,4&patch_size=4&window_size=4&image_size=32",
    "swinv2": "embed_dim=16&depths=1,2&num_heads=2,4&patch_size=4&window_size=4&image_size=32",
    "wav2vec2": "conv_dim=16,16,16&conv_stride=5,2,2&conv_kernel=10,3,3&num_conv_pos_embeddings=16&num_conv_pos_embedding_groups=2&classifier_proj_size=16",
    "mamba": "state_size=4",
    "gemma2": "sliding_window=8",
    "mistral": "sliding_window=8",
}
for _type in ("hubert", "wavlm", "unispeech", "sew", "data2vec-audio"):
    MORE[_type] = MORE["wav2vec2"]


def small(
    model_type: str, sizes: Mapping[str, Any] = SMALL, more: Mapping[str, str] = MORE, *, is_decoder: bool = False
) -> str:
    """The target of a small model of a transformers type; as a causal language model where it `is_decoder`."""
    from transformers import CONFIG_MAPPING

    from plait.capture.target import load_target

    config = CONFIG_MAPPING[model_type]()
    values: dict[str, str] = {}

    def look(part: Any, prefix: str) -> None:
        known = part.to_dict()
        for key, value in sizes.items():
            own = getattr(part, "attribute_map", {}).get(key, key)
            if isinstance(known.get(own), int) and not isinstance(known[own], bool):
                values[prefix + own] = str(value)
        if is_decoder and known.get("is_decoder") is False and not known.get("is_encoder_decoder"):
            values[f"{prefix}is_decoder"] = "True"
        for key, other in vars(part).items():
            if hasattr(other, "to_dict") and not key.startswith("_"):
                look(other, f"{prefix}{key}.")

    look(config, "")
    stated = dict(pair.split("=") for pair in more.get(model_type, "").split("&") if pair)
    if is_decoder:
        stated["task"] = "causal-lm"
    values.update(stated)
    values.setdefault("seq_len", "16")
    # Heads and groups of a type may ask for other sizes; a key that the type refuses by itself is left at its default.
    while True:
        target = f"hf:{model_type}?" + "&".join(f"{k}={v}" for k, v in values.items())
        try:
            load_target(target)
        except Exception as problem:
            refused = [k for k in values if k.rpartition(".")[2] in str(problem) and k not in stated]
            if not refused:
                return target
            for key in refused:
                del values[key]
        else:
            return target
