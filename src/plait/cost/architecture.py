"""A Graph from architecture figures: GPT- and llama-like decoders, grouped queries, mixtures of experts.

Operators are those of an eager PyTorch model, counted one by one: what reads, writes and saves how many
bytes. Where a table of measurements gives no model, only its figures, this stands in for a capture.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from plait.errors import TableError
from plait.schema.graph import DTYPE_BYTES, Graph, Operator, ParameterSpec, Segment, TensorSpec
from plait.schema.records import Record

__all__ = ["Architecture", "LatentAttention", "build_graph", "count_parameters"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention(Record):
    """Multi-head latent attention: low-rank queries, keys and values.

    Defaults are those of DeepSeek-V3 (arXiv 2412.19437, section 4.2).
    """

    query_rank: int = 1536
    key_value_rank: int = 512
    rotary_dim: int = 64
    plain_dim: int = 128
    value_dim: int = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture(Record):
    """The figures of a decoder."""

    name: str
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    seq_len: int
    gated: bool = True
    """Gate and up projections (SwiGLU), rather than one."""
    learned_positions: bool = False
    tied: bool = False
    """The output projection is the embedding table."""
    bias: bool = False
    dropout: bool = False
    fused_attention: bool = True
    """Scores never leave the chip (FlashAttention); otherwise each score is written, masked, normalised, read."""
    experts: int = 0
    topk: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    """Width of the expert that every token passes, 0: none."""
    dense_layers: int = 0
    """Layers at the start without experts."""
    latent: LatentAttention | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn_hidden", "heads", "kv_heads", "head_dim", "vocab", "seq_len"):
            if getattr(self, name) < 1:
                raise TableError(f"architecture {self.name}: {name}={getattr(self, name)} must be at least 1")
        if self.experts and not 1 <= self.topk <= self.experts:
            raise TableError(f"architecture {self.name}: topk={self.topk} is not within 1 to experts={self.experts}")


@functools.lru_cache(maxsize=512)
def count_parameters(architecture: Architecture) -> int:
    """Parameters in all, tied ones once."""
    return build_graph(architecture).numel


class _Chain:
    """Collects the operators of one segment; each method returns the tensor it makes."""

    def __init__(self, prefix: str, dtype: str) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.operators: list[Operator] = []
        self.parameters: list[ParameterSpec] = []
        self.kept: set[str] = set()

    def _save(self, *tensors: TensorSpec) -> int:
        new = [t for t in tensors if t.name not in self.kept]
        self.kept |= {t.name for t in new}
        return sum(t.nbytes for t in new)

    def _weight(self, name: str, shape: tuple[int, ...]) -> ParameterSpec:
        spec = ParameterSpec(name=f"{self.prefix}.{name}", shape=shape, dtype=self.dtype)
        self.parameters.append(spec)
        return spec

    def add(
        self,
        name: str,
        kind: str,
        inputs: Sequence[TensorSpec],
        shape: tuple[int, ...],
        *,
        dtype: str = "",
        parameters: Sequence[str] = (),
        weight_bytes: int = 0,
        flops: float = 0.0,
        backward_flops: float | None = None,
        saved: Sequence[TensorSpec] = (),
        extra_saved: int = 0,
        gemm: tuple[int, int, int, int] | None = None,
        target: str = "",
    ) -> TensorSpec:
        out = TensorSpec(name=f"{self.prefix}.{name}", shape=shape, dtype=dtype or self.dtype)
        self.operators.append(
            Operator(
                name=out.name,
                target=target or f"aten.{kind}",
                kind=kind,
                module=self.prefix,
                inputs=tuple(inputs),
                outputs=(out,),
                parameters=tuple(parameters),
                flops=flops,
                backward_flops=2 * flops if backward_flops is None else backward_flops,
                read_bytes=sum(t.nbytes for t in inputs) + weight_bytes,
                write_bytes=out.nbytes,
                saved_bytes=self._save(*saved) + extra_saved,
                gemm=gemm,
            )
        )
        return out

    def linear(self, name: str, x: TensorSpec, width: int, *, bias: bool = False, tie: str = "") -> TensorSpec:
        rows, depth = x.numel // x.shape[-1], x.shape[-1]
        names, nbytes = [], width * depth * DTYPE_BYTES[self.dtype]
        if tie:
            names.append(tie)
        else:
            names.append(self._weight(f"{name}.weight", (width, depth)).name)
        if bias:
            names.append(self._weight(f"{name}.bias", (width,)).name)
        return self.add(
            name,
            "matmul",
            [x],
            (*x.shape[:-1], width),
            parameters=names,
            weight_bytes=nbytes,
            flops=2.0 * rows * width * depth,
            saved=[x],
            gemm=(1, rows, width, depth),
            target="aten.linear.default",
        )

    def norm(self, name: str, x: TensorSpec, *, bias: bool = False) -> TensorSpec:
        names = [self._weight(f"{name}.weight", (x.shape[-1],)).name]
        if bias:
            names.append(self._weight(f"{name}.bias", (x.shape[-1],)).name)
        return self.add(name, "norm", [x], x.shape, parameters=names, saved=[x], target="aten.layer_norm.default")

    def elementwise(
        self, name: str, inputs: Sequence[TensorSpec], shape: tuple[int, ...], **more: object
    ) -> TensorSpec:
        return self.add(name, "elementwise", inputs, shape, **more)  # type: ignore[arg-type]


def _attention(chain: _Chain, a: Architecture, q: TensorSpec, k: TensorSpec, v: TensorSpec) -> TensorSpec:
    """Scores, softmax, weighted sum. q: [batch, heads, length, width]; FLOP in full, causal or not."""
    batch, heads, length, width = q.shape
    value_width = v.shape[-1]
    flops = 2.0 * batch * heads * length * length * (width + value_width)
    out_shape = (batch, heads, length, value_width)
    if a.fused_attention:
        # FlashAttention saves q, k, v, the output (kept by the projection that follows) and one fp32 per row;
        # its backward computes the scores again: 5 matmuls against 2 (Dao 2023, arXiv 2307.08691, section 2.3.1).
        return chain.add(
            "attention",
            "attention",
            [q, k, v],
            out_shape,
            flops=flops,
            backward_flops=2 * flops,
            saved=[q, k, v],
            extra_saved=batch * heads * length * 4,
            gemm=(batch * heads, length, length, width),
            target="aten.scaled_dot_product_attention.default",
        )
    square = (batch, heads, length, length)
    half = 2.0 * batch * heads * length * length
    scores = chain.add(
        "scores",
        "matmul",
        [q, k],
        square,
        flops=half * width,
        saved=[q, k],
        gemm=(batch * heads, length, length, width),
        target="aten.bmm.default",
    )
    masked = chain.elementwise("mask", [scores], square)
    weights = chain.add("softmax", "softmax", [masked], square)
    chain.operators[-1] = _with_saved(chain, weights)
    if a.dropout:
        count = weights.numel
        weights = chain.add("attention_dropout", "random", [weights], square, extra_saved=count)  # a mask byte each
    return chain.add(
        "context",
        "matmul",
        [weights, v],
        out_shape,
        flops=half * value_width,
        saved=[weights, v],
        gemm=(batch * heads, length, value_width, length),
        target="aten.bmm.default",
    )


def _with_saved(chain: _Chain, tensor: TensorSpec) -> Operator:
    """The last operator, keeping its own output for the backward."""
    last = chain.operators[-1]
    values = {name: getattr(last, name) for name in Operator.__dataclass_fields__}
    return Operator(**{**values, "saved_bytes": last.saved_bytes + chain._save(tensor)})


def _self_attention(chain: _Chain, a: Architecture, x: TensorSpec) -> TensorSpec:
    batch, length, hidden = x.shape
    if a.latent is not None:
        return _latent_attention(chain, a, x, a.latent)
    width = a.head_dim
    fused = chain.linear("qkv", x, (a.heads + 2 * a.kv_heads) * width, bias=a.bias)
    q = TensorSpec(name=f"{chain.prefix}.q", shape=(batch, a.heads, length, width), dtype=chain.dtype)
    k = TensorSpec(name=f"{chain.prefix}.k", shape=(batch, a.kv_heads, length, width), dtype=chain.dtype)
    v = TensorSpec(name=f"{chain.prefix}.v", shape=(batch, a.kv_heads, length, width), dtype=chain.dtype)
    chain.operators.append(_split(chain, "split", fused, (q, k, v)))
    if not a.learned_positions:
        q = chain.elementwise("rotary_q", [q], q.shape)
        k = chain.elementwise("rotary_k", [k], k.shape)
    mixed = _attention(chain, a, q, k, v)
    flat = TensorSpec(name=f"{chain.prefix}.merged", shape=(batch, length, a.heads * width), dtype=chain.dtype)
    chain.operators.append(_split(chain, "merge", mixed, (flat,)))
    return chain.linear("out", flat, hidden, bias=a.bias)


def _split(chain: _Chain, name: str, x: TensorSpec, outputs: tuple[TensorSpec, ...]) -> Operator:
    return Operator(
        name=f"{chain.prefix}.{name}",
        target="aten.view",
        kind="view",
        module=chain.prefix,
        inputs=(x,),
        outputs=outputs,
    )


def _latent_attention(chain: _Chain, a: Architecture, x: TensorSpec, m: LatentAttention) -> TensorSpec:
    batch, length, hidden = x.shape
    down_q = chain.norm("q_norm", chain.linear("q_down", x, m.query_rank))
    up_q = chain.linear("q_up", down_q, a.heads * (m.plain_dim + m.rotary_dim))
    down_kv = chain.norm("kv_norm", chain.linear("kv_down", x, m.key_value_rank + m.rotary_dim))
    up_kv = chain.linear("kv_up", down_kv, a.heads * (m.plain_dim + m.value_dim))
    width = m.plain_dim + m.rotary_dim
    q = chain.elementwise("rotary_q", [up_q], (batch, a.heads, length, width))
    k = chain.elementwise("rotary_k", [up_kv], (batch, a.heads, length, width))
    v = TensorSpec(name=f"{chain.prefix}.v", shape=(batch, a.heads, length, m.value_dim), dtype=chain.dtype)
    chain.operators.append(_split(chain, "split", up_kv, (v,)))
    mixed = _attention(chain, a, q, k, v)
    flat = TensorSpec(name=f"{chain.prefix}.merged", shape=(batch, length, a.heads * m.value_dim), dtype=chain.dtype)
    chain.operators.append(_split(chain, "merge", mixed, (flat,)))
    return chain.linear("out", flat, hidden)


def _mlp(chain: _Chain, a: Architecture, x: TensorSpec, width: int, name: str = "mlp") -> TensorSpec:
    shape = (*x.shape[:-1], width)
    if a.gated:
        both = chain.linear(f"{name}.gate_up", x, 2 * width, bias=a.bias)
        gate = TensorSpec(name=f"{chain.prefix}.{name}.gate", shape=shape, dtype=chain.dtype)
        up = TensorSpec(name=f"{chain.prefix}.{name}.up", shape=shape, dtype=chain.dtype)
        chain.operators.append(_split(chain, f"{name}.chunk", both, (gate, up)))
        active = chain.elementwise(f"{name}.silu", [gate], shape, saved=[gate])
        middle = chain.elementwise(f"{name}.mul", [active, up], shape, saved=[active, up])
    else:
        up = chain.linear(f"{name}.up", x, width, bias=a.bias)
        middle = chain.elementwise(f"{name}.gelu", [up], shape, saved=[up])
    return chain.linear(f"{name}.down", middle, x.shape[-1], bias=a.bias)


def _experts(chain: _Chain, a: Architecture, x: TensorSpec) -> TensorSpec:
    """Router, dispatch, grouped matmuls, combine. Each expert gets an equal share of the tokens."""
    batch, length, hidden = x.shape
    tokens = batch * length
    routed = tokens * a.topk
    size = DTYPE_BYTES[chain.dtype]
    scores = chain.linear("router", x, a.experts)
    chosen = chain.add("topk", "softmax", [scores], (tokens, a.topk), saved=[scores])
    sorted_x = chain.add("dispatch", "scatter", [x, chosen], (routed, hidden))
    width = a.expert_ffn
    first = 2 * width if a.gated else width

    def grouped(name: str, source: TensorSpec, n: int, k: int) -> TensorSpec:
        weight = chain._weight(f"experts.{name}", (a.experts, k, n))
        return chain.add(
            f"experts.{name}", "matmul", [source], (routed, n), parameters=[weight.name],
            weight_bytes=a.experts * n * k * size, flops=2.0 * routed * n * k, saved=[source],
            gemm=(a.experts, max(1, routed // a.experts), n, k), target="aten._grouped_mm.default",
        )  # fmt: skip

    both = grouped("gate_up", sorted_x, first, hidden)
    middle = chain.elementwise("experts.act", [both], (routed, width), saved=[both])
    down = grouped("down", middle, hidden, width)
    combined = chain.add("combine", "scatter", [down, chosen], x.shape, saved=[down])
    if a.shared_ffn:
        shared = _mlp(chain, a, x, a.shared_ffn, "shared")
        combined = chain.elementwise("shared_add", [combined, shared], x.shape)
    return combined


def _layer(a: Architecture, index: int, batch: int, dtype: str) -> tuple[_Chain, TensorSpec]:
    chain = _Chain(f"layers.{index}", dtype)
    x = TensorSpec(name=f"layers.{index}.input", shape=(batch, a.seq_len, a.hidden), dtype=dtype)
    mixed = _self_attention(chain, a, chain.norm("norm1", x, bias=a.bias))
    if a.dropout:
        mixed = chain.add("dropout1", "random", [mixed], mixed.shape, extra_saved=mixed.numel)
    middle = chain.elementwise("residual1", [x, mixed], x.shape)
    normed = chain.norm("norm2", middle, bias=a.bias)
    sparse = a.experts and index >= a.dense_layers
    result = _experts(chain, a, normed) if sparse else _mlp(chain, a, normed, a.ffn_hidden)
    if a.dropout:
        result = chain.add("dropout2", "random", [result], result.shape, extra_saved=result.numel)
    return chain, chain.elementwise("residual2", [middle, result], x.shape)


def build_graph(a: Architecture, *, batch: int = 1, dtype: str = "bfloat16") -> Graph:
    """The forward and loss of `a` at `batch` samples: embedding, layers, head; one segment each."""
    size = DTYPE_BYTES[dtype]
    tokens = TensorSpec(name="tokens", shape=(batch, a.seq_len), dtype="int64")
    hidden_shape = (batch, a.seq_len, a.hidden)
    start = _Chain("embedding", dtype)
    table = start._weight("weight", (a.vocab, a.hidden))
    x = start.add(
        "lookup",
        "embedding",
        [tokens],
        hidden_shape,
        parameters=[table.name],
        weight_bytes=batch * a.seq_len * a.hidden * size,
        target="aten.embedding.default",
    )
    if a.learned_positions:
        positions = start._weight("positions", (a.seq_len, a.hidden))
        x = start.add("add_positions", "elementwise", [x], hidden_shape, parameters=[positions.name])
    if a.dropout:
        x = start.add("dropout", "random", [x], hidden_shape, extra_saved=x.numel)

    parameters = list(start.parameters)
    segments = [_segment(0, "embedding", start, (), (_named(x, "layers.0.input"),), 0)]
    first_of: dict[bool, int] = {}
    shape_of: dict[bool, tuple[_Chain, TensorSpec]] = {}
    for index in range(a.layers):
        sparse = bool(a.experts) and index >= a.dense_layers
        if sparse not in shape_of:
            shape_of[sparse] = _layer(a, index, batch, dtype)
            first_of[sparse] = index + 1
        chain, out = shape_of[sparse]
        inside = TensorSpec(name=f"{chain.prefix}.input", shape=hidden_shape, dtype=dtype)
        own = [
            ParameterSpec(name=p.name.replace(chain.prefix, f"layers.{index}", 1), shape=p.shape, dtype=p.dtype)
            for p in chain.parameters
        ]
        parameters += own
        segments.append(
            Segment(index=index + 1, name=f"layers.{index}", operators=tuple(chain.operators),
                    parameters=tuple(p.name for p in own), live_in=(inside,), live_out=(out,), equals=first_of[sparse])
        )  # fmt: skip
    head = _Chain("head", dtype)
    last = TensorSpec(name="head.input", shape=hidden_shape, dtype=dtype)
    normed = head.norm("norm", last, bias=a.bias)
    logits = head.linear("logits", normed, a.vocab, tie=table.name if a.tied else "")
    # The loss is computed in fp32: a copy of the logits, their log-softmax (kept), and its gradient.
    wide = head.add("float", "elementwise", [logits], logits.shape, dtype="float32")
    head.add("loss", "loss", [wide], (1,), dtype="float32", saved=[wide], target="aten.cross_entropy_loss.default")
    parameters += head.parameters
    names = [p.name for p in head.parameters] + ([table.name] if a.tied else [])
    segments.append(
        Segment(index=a.layers + 1, name="head", operators=tuple(head.operators), parameters=tuple(names),
                live_in=(last,), live_out=(), equals=a.layers + 1)
    )  # fmt: skip
    return Graph(
        name=a.name,
        batch=batch,
        tokens_per_sample=a.seq_len,
        inputs=(tokens,),
        parameters=tuple(parameters),
        buffers=(),
        segments=tuple(segments),
    )


def _named(tensor: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name=name, shape=tensor.shape, dtype=tensor.dtype)


def _segment(index: int, name: str, chain: _Chain, live_in: tuple[TensorSpec, ...], live_out: tuple[TensorSpec, ...],
             equals: int) -> Segment:  # fmt: skip
    return Segment(
        index=index,
        name=name,
        operators=tuple(chain.operators),
        parameters=tuple(p.name for p in chain.parameters),
        live_in=live_in,
        live_out=live_out,
        equals=equals,
    )
