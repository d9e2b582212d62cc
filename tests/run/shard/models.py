"""Small models to shard: hand-written ones, and transformers architectures by their type."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Built = tuple[nn.Module, dict[str, torch.Tensor]]

# Sizes under the names that configs use for them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    "vocab_size": 96,
    "use_cache": False,
}
# What a type needs beyond, or instead: only where the sizes above contradict each other.
_MORE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8, "expand": 2},
    "t5": {"d_kv": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 32},
    "falcon": {"new_decoder_architecture": False},
    "persimmon": {"num_key_value_heads": 4},
    "stablelm": {"num_key_value_heads": 4},
    "xlnet": {"d_inner": 64},
    "biogpt": {},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "modernbert": {"global_attn_every_n_layers": 2},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "vit": {"image_size": 16, "patch_size": 4},
    "deit": {"image_size": 16, "patch_size": 4},
    "beit": {"image_size": 16, "patch_size": 4},
    "dinov2": {"image_size": 16, "patch_size": 4},
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "convnextv2": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
    "swin": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8},
    "wav2vec2": {
        "conv_dim": [32, 32],
        "conv_stride": [5, 2],
        "conv_kernel": [10, 3],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
    },
    "hubert": {
        "conv_dim": [32, 32],
        "conv_stride": [5, 2],
        "conv_kernel": [10, 3],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
    },
    "whisper": {"max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 8, "mask_time_prob": 0.0},
}
_VISION = {"vit", "deit", "beit", "dinov2", "convnext", "convnextv2", "resnet", "swin", "regnet"}
_SPEECH = {"wav2vec2", "hubert"}
_MASKED = {
    *("bert", "roberta", "electra", "albert", "mpnet", "deberta-v2", "ernie", "camembert", "roformer", "convbert"),
    *("nystromformer", "megatron-bert", "mobilebert", "modernbert", "squeezebert", "xlm-roberta", "distilbert", "fnet"),
    *("layoutlm", "deberta", "funnel", "esm", "ibert", "rembert", "data2vec-text", "yoso", "xlm", "flaubert", "bros"),
}
_SEQUENCE = {
    "t5",
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "blenderbot",
    "mt5",
    "m2m_100",
    "plbart",
    "umt5",
    "fsmt",
    "led",
    "prophetnet",
}


def huggingface(kind: str) -> Built:
    """A small transformers model of one type with the head for its usual task, and a batch."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind, _, variant = kind.partition("?")
    config_class = type(transformers.AutoConfig.for_model(kind))
    plain = config_class()
    sizes = {k: v for k, v in _SIZES.items() if hasattr(plain, k) and k not in plain.attribute_map}
    sizes = {k: v for k, v in sizes.items() if not isinstance(getattr(plain, k), list | tuple)}
    if kind in _SEQUENCE:
        sizes["decoder_start_token_id"] = 1
    off = {k: 0.0 for k, v in plain.to_dict().items() if ("drop" in k or "pdrop" in k) and isinstance(v, float)}
    given = {**sizes, **off, **_MORE.get(kind, {})}
    for pair in filter(None, variant.split("&")):
        key, _, text = pair.partition("=")
        given[key] = {"true": True, "false": False}[text] if text in ("true", "false") else int(text)
    config = config_class(**given)
    config.use_cache = False
    auto = _auto(kind, transformers)
    # Not every architecture knows every option, and a refused one stays in the config: a copy for each try.
    for options in (
        {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"},
        {"attn_implementation": "sdpa"},
        {},
    ):
        try:
            model = auto.from_config(copy.deepcopy(config), **options)
            break
        except (ValueError, TypeError, AttributeError, ImportError):
            if not options:
                raise
    switch_off_randomness(model)
    return model, _batch(kind, config)


def _auto(kind: str, transformers: Any) -> Any:
    if kind in _VISION:
        return transformers.AutoModelForImageClassification
    if kind in _SPEECH:
        return transformers.AutoModelForAudioClassification
    if kind == "whisper":
        return transformers.AutoModelForSpeechSeq2Seq
    if kind in _MASKED:
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModelForSeq2SeqLM if kind in _SEQUENCE else transformers.AutoModelForCausalLM


def _batch(kind: str, config: Any) -> dict[str, torch.Tensor]:
    if kind in _VISION:
        size = getattr(config, "image_size", 32) if kind not in ("convnext", "convnextv2", "resnet", "regnet") else 32
        return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 1])}
    if kind in _SPEECH:
        return {"input_values": torch.randn(2, 400), "labels": torch.tensor([0, 1])}
    if kind == "whisper":
        return {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(2, 90, (2, 12))}
    tokens = torch.randint(2, 90, (2, 16))
    labels = torch.randint(2, 90, (2, 16))
    labels[0, :3] = -100
    return {"input_ids": tokens, "labels": labels}


def switch_off_randomness(model: nn.Module) -> None:
    """Probability 0 for every dropout, train mode kept."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_p", "drop_prob", "layerdrop", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


class Perceptron(nn.Module):
    """fc1 -> gelu -> fc2, mean square loss."""

    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(self.fc2(functional.gelu(self.fc1(x))), y)


class Noisy(nn.Module):
    """Dropout on a sharded value, on a replicated one, and in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = functional.dropout(self.down(functional.dropout(self.up(x).relu(), 0.5)), 0.5)
        q, k, v = (p(x).view(4, -1, 4, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v, dropout_p=0.3).transpose(1, 2).flatten(2))
        return functional.mse_loss(x, y)


def noisy() -> Built:
    """Random operators that stay switched on."""
    return Noisy(), {"x": torch.randn(4, 8, 32), "y": torch.randn(4, 8, 32)}


def perceptron() -> Built:
    """Two layers."""
    return Perceptron(), {"x": torch.randn(4, 16), "y": torch.randn(4, 16)}


def perceptron_uneven() -> Built:
    """A hidden layer that no group size divides."""
    return Perceptron(16, 35), {"x": torch.randn(4, 16), "y": torch.randn(4, 16)}


class Block(nn.Module):
    """Attention with one fused projection, and an MLP."""

    def __init__(self, width: int, heads: int, form: str) -> None:
        super().__init__()
        self.heads, self.form = heads, form
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, w = x.shape
        fused = self.qkv(self.norm1(x))
        if self.form == "chunk":
            q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in fused.chunk(3, -1))
        elif self.form == "view3":
            q, k, v = fused.view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = fused.view(b, s, self.heads, -1).transpose(1, 2).chunk(3, -1)
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, s, w))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A GPT whose table is tied to its output."""

    def __init__(
        self, vocab: int = 97, width: int = 32, heads: int = 4, form: str = "chunk", tied: bool = True
    ) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(vocab, width, padding_idx=60), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width, heads, form) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())


def _tokens(vocab: int = 97) -> dict[str, torch.Tensor]:
    labels = torch.randint(0, vocab, (2, 16))
    labels[1, 4:7] = -100
    return {"tokens": torch.randint(0, vocab, (2, 16)), "labels": labels}


def decoder_chunk() -> Built:
    """chunk(3) of a fused projection, an odd vocabulary, tied."""
    return Decoder(), _tokens()


def decoder_view3() -> Built:
    """view(b, s, 3, heads, size) of a fused projection."""
    return Decoder(form="view3", tied=False), _tokens()


def decoder_heads() -> Built:
    """view(b, s, heads, 3 * size) of a fused projection."""
    return Decoder(form="heads"), _tokens()


def decoder_odd_heads() -> Built:
    """Three heads on two ranks."""
    return Decoder(width=24, heads=3), _tokens()


class Residual(nn.Module):
    """Two convolutions with batch norm, in-place activations and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.short(x)
        return functional.relu_(y)


class ConvNet(nn.Module):
    """A small residual network with a depthwise layer, group norm and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Residual(3, 16, 1), nn.MaxPool2d(2), Residual(16, 32, 2))
        self.wide, self.deep = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.norm, self.narrow, self.head = nn.GroupNorm(8, 64), nn.Conv2d(64, 32, 1), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        x = self.narrow(functional.silu(self.norm(self.deep(self.wide(x)))))
        return functional.cross_entropy(self.head(x.mean((2, 3))), y)


def convnet() -> Built:
    """Convolutions, batch norm's running statistics, in-place activations."""
    return ConvNet(), {"x": torch.randn(4, 3, 16, 16), "y": torch.tensor([1, 2, 3, 4])}


class InPlace(nn.Module):
    """Writes into values that others read, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.other, self.back = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.up(x).tanh() * 2
        before = h.sum()
        part = h[:, 3:9]
        part.mul_(2)
        h[:, 1] = 0.5
        h = self.down(h)
        h += x
        z = self.other(h).sigmoid() * 3
        z.add_(1)
        alias = z.view(-1, 4, 8)
        z.mul_(0.5)
        return functional.mse_loss(self.back(z) + alias.sum((1, 2)).unsqueeze(1) + before, y)


def in_place() -> Built:
    """Aliases of sharded values, written to."""
    return InPlace(), {"x": torch.randn(4, 16), "y": torch.randn(4, 16)}


class Odd(nn.Module):
    """Shared and partly used parameters, norms over what is sharded, losses over it, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(16, 32), nn.Linear(32, 16), nn.Parameter(torch.randn(32))
        self.norm, self.gate = nn.LayerNorm(32), nn.Linear(16, 32)
        self.classes = nn.Linear(16, 40)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.up(x)) * self.scale
        h = functional.rms_norm(h, (32,), self.scale[:32])
        h = h.softmax(-1) * torch.sigmoid(self.gate(x)) + functional.linear(x, self.up.weight)
        out = self.down(h) + functional.linear(h, self.up.weight.t())
        scores = functional.log_softmax(self.classes(out), -1)
        penalty = (self.up.weight * self.down.weight.t()).pow(2).mean() + self.scale.abs().sum()
        return functional.nll_loss(scores, y) + penalty + 0.1 * torch.var(h, -1).mean()


def odd() -> Built:
    """A parameter with several readers that want it differently; in double, as its gradients cancel."""
    return Odd().double(), {"x": torch.randn(4, 16).double(), "y": torch.tensor([1, 2, 3, 30])}


class Translator(nn.Module):
    """nn.Transformer with its own masks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.body = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 50)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        out = self.body(self.table(source), self.table(target), tgt_mask=mask, tgt_is_causal=True)
        return functional.cross_entropy(self.head(out).transpose(1, 2), target)


def translator() -> Built:
    """Encoder and decoder, scaled attention of torch.nn."""
    return Translator(), {"source": torch.randint(0, 50, (2, 12)), "target": torch.randint(0, 50, (2, 10))}


class Recurrent(nn.Module):
    """An LSTM, which has no rule, between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(50, 16), nn.LSTM(16, 16, 2, batch_first=True)
        self.up, self.head = nn.Linear(16, 64), nn.Linear(64, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out, _ = self.body(self.table(tokens))
        return functional.cross_entropy(self.head(self.up(out).relu()).flatten(0, 1), tokens.flatten())


def recurrent() -> Built:
    """An operator without a rule."""
    return Recurrent(), {"tokens": torch.randint(0, 50, (2, 12))}


class Recommender(nn.Module):
    """Tables of categories, summed bags, and crosses."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(200, 16) for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
        self.top = nn.Sequential(nn.Linear(22, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor, clicks: torch.Tensor) -> torch.Tensor:
        found = [self.bottom(dense), *(table(sparse[:, i]) for i, table in enumerate(self.tables))]
        stacked = torch.stack(found, 1)
        crosses = torch.bmm(stacked, stacked.transpose(1, 2))
        rows, columns = torch.triu_indices(4, 4, 1)
        joined = torch.cat([found[0], crosses[:, rows, columns]], 1)
        return functional.binary_cross_entropy_with_logits(self.top(joined).squeeze(1), clicks)


def recommender() -> Built:
    """Large tables, small products."""
    inputs = {"dense": torch.randn(8, 8), "sparse": torch.randint(0, 200, (8, 3)), "clicks": torch.rand(8).round()}
    return Recommender(), inputs
