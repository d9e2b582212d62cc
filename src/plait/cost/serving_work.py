"""What serving one model has to read and compute, counted over a captured graph: no rate is applied here.

A graph is captured with its loss, at one length. Serving needs other sums: weights that every step reads, FLOP of one
token, FLOP of one pair of token and cached position, and the bytes that a cached position holds.

**What is cached.** For every attention the keys and values are followed back to the matmuls that made them. On the way a
tensor carries at most its own elements, so a slice of a fused projection counts for the slice, keys repeated for groups
of queries count once, and rotary embeddings change nothing. Where the projection itself comes from a much narrower one
(latent attention), that one is cached. No name is looked at. Of an encoder-decoder, the encoder and the keys and values of
attention to it are counted apart (`serving_encoder.py`): they are made once for a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from plait.cost.serving_encoder import Encoder, encoder_of
from plait.cost.work import Split, parameter_specs, segment_work
from plait.schema.graph import Graph, Operator, ParameterSpec, TensorSpec

__all__ = ["Experts", "Served", "served_work"]

_FLOATS = ("float32", "bfloat16", "float16", "float64")
_NARROW = (
    4  # a projection this many times narrower than what it is expanded to is what runtimes cache (latent attention)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """All expert matmuls of a model."""

    weights: float
    """Elements of all experts."""
    count: int
    """Experts in a layer."""
    active: float
    """Experts that one token passes."""
    flops: float
    """Of one token."""

    def touched(self, tokens: float) -> float:
        """Fraction of the experts that `tokens` tokens meet, each drawing its experts evenly and at random."""
        missed: float = (1.0 - min(1.0, self.active / self.count)) ** max(tokens, 0.0)
        return 1.0 - missed


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """Sums for one model. Elements rather than bytes: precision is chosen later."""

    decodes: bool
    """Whether it makes tokens one by one: it maps token ids to scores over the table they were looked up in."""
    length: int
    """Positions of the captured sample (1 where it has no sequence)."""
    matmul_weights: float
    """Elements of matmuls and convolutions that every token passes; output projection and experts not counted."""
    head_weights: float
    """Elements of the output projection."""
    other_weights: float
    """Elements held beside: tables that are looked up, norms; a tied table counts in `head_weights`."""
    experts: Experts | None
    flops: float
    """Of `matmul_weights`, one token (one sample where it does not decode)."""
    head_flops: float
    attention_flops: float
    """One token and one cached position; of a whole sample where it does not decode."""
    cached: float
    """Elements that one position keeps in the key-value cache, all layers."""
    cache_heads: int
    """Ways in which tensor parallelism can split the cache; beyond that it is held several times."""
    plain: float
    """Elements read and written by operators with little arithmetic, one token (sample)."""
    looked_up: float
    """Elements read from tables, one token (sample)."""
    kernels: int
    """Matmuls, convolutions and attentions: what is started one by one."""
    collectives: int
    """All-reduces of tensor parallelism in one forward."""
    collective: float
    """Elements of one of them, one token (sample)."""
    widest: float
    """Elements that the largest operator reads and writes, one token (sample)."""
    outputs: float
    """Elements of the scores of one position."""
    encoder: Served | None = None
    """What runs once over a prompt, one position each; `matmul_weights` above are then the decoder's alone."""
    cross_flops: float = 0.0
    """Of attention to the encoder: one token and one of its positions."""
    cross_cached: float = 0.0
    """Elements that one position of the encoder keeps in the cache, all layers of the decoder."""
    is_fixed: bool = False
    """An encoder whose input is no text: its length is that of the captured sample."""

    @property
    def parameters(self) -> float:
        """Elements held in all."""
        experts: float = self.experts.weights if self.experts else 0.0
        encoder = self.encoder.parameters if self.encoder else 0.0
        return self.matmul_weights + self.head_weights + self.other_weights + experts + encoder


@dataclass(slots=True)
class _Carried:
    """For each tensor, how many elements of each matmul's result it holds at most."""

    of: dict[str, dict[str, float]] = field(default_factory=dict)
    made_by: dict[str, Operator] = field(default_factory=dict)
    foreign: set[str] = field(default_factory=set)
    """Tensors that depend on something else than matmul results: a residual stream, an embedding."""
    weights: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameters that a tensor is a view or a copy of."""

    def parameters(self, op: Operator) -> tuple[str, ...]:
        """Parameters that `op` uses, also those that come transposed or sliced."""
        return tuple(dict.fromkeys((*op.parameters, *(p for x in op.inputs for p in self.weights.get(x.name, ())))))

    def add(self, op: Operator, names: tuple[str, ...], *, is_linear: bool) -> None:
        """Follows one operator."""
        views = op.kind == "view" or ".to." in op.target
        for out in op.outputs:
            self.made_by[out.name] = op
            if names and views:
                self.weights[out.name] = names
            if is_linear:
                self.of[out.name] = {out.name: float(out.numel)}
                continue
            merged: dict[str, float] = {}
            alien = op.kind == "embedding"
            for source in op.inputs:
                for origin, amount in self.of.get(source.name, {}).items():
                    merged[origin] = merged.get(origin, 0.0) + amount
                alien |= source.name in self.foreign
            size = {origin: float(self.made_by[origin].outputs[0].numel) for origin in merged}
            self.of[out.name] = {o: min(a, float(out.numel), size[o]) for o, a in merged.items()}
            if alien or len(merged) > 1:
                self.foreign.add(out.name)

    def cached(self, *tensors: TensorSpec) -> float:
        """Elements kept of keys and values."""
        total: dict[str, float] = {}
        for tensor in tensors:
            for origin, amount in self.of.get(tensor.name, {}).items():
                total[origin] = total.get(origin, 0.0) + amount
        kept = {o: min(a, float(self.made_by[o].outputs[0].numel)) for o, a in total.items()}
        narrow: dict[str, float] = {}
        for origin, wide in kept.items():
            source = self.made_by[origin].inputs[0] if self.made_by[origin].inputs else None
            below = self.of.get(source.name, {}) if source is not None else {}
            single = (
                next(iter(below)) if len(below) == 1 and source is not None and source.name not in self.foreign else ""
            )
            small = bool(single) and _NARROW * below[single] <= wide
            held, amount = (single, below[single]) if small else (origin, wide)
            narrow[held] = narrow.get(held, 0.0) + amount
        # What is cached of a narrow projection holds the rest that was sliced from it (its rotary part) as well.
        return sum(min(a, float(self.made_by[o].outputs[0].numel)) for o, a in narrow.items())


@dataclass(slots=True)
class _Sums:
    matmul: float = 0.0
    experts: float = 0.0
    expert_count: int = 0
    expert_active: float = 0.0
    expert_flops: float = 0.0
    flops: float = 0.0
    attention: float = 0.0
    cached: float = 0.0
    heads: int = 1 << 10
    """More than any model has, until an attention says how many."""
    plain: float = 0.0
    looked_up: float = 0.0
    widest: float = 0.0
    kernels: int = 0
    collectives: int = 0
    collective: float = 0.0
    cross: float = 0.0
    cross_cached: float = 0.0


def served_work(graph: Graph) -> Served:
    """The sums for serving `graph`; loss, dropout and what only the loss needs are left out."""
    specs = parameter_specs(graph)
    head = _head(graph, specs)
    encoder = (
        encoder_of(graph, specs, head.outputs[0].shape[-1]) if head and head.outputs and head.outputs[0].shape else None
    )
    decodes = _decodes(graph, head, specs, crosses=encoder is not None)
    if head is None or not decodes:
        encoder = None
    positions = graph.batch * (graph.tokens_per_sample if decodes else 1)
    if encoder is not None and head is not None:
        positions = head.outputs[0].numel // head.outputs[0].shape[-1]
    sums, inner = _count(graph, specs, head, encoder, decodes=decodes, positions=positions)
    _collectives(sums, graph, specs, positions)
    head_weights = float(_numel(head.parameters, specs)) if head else 0.0
    experts = None
    if sums.experts:
        experts = Experts(
            weights=sums.experts, count=max(1, sums.expert_count), active=sums.expert_active, flops=sums.expert_flops
        )
    inside = None if encoder is None else _encoder(inner, sums, encoder)
    held = inside.parameters if inside else 0.0
    return Served(
        decodes=decodes,
        length=graph.tokens_per_sample,
        matmul_weights=sums.matmul,
        head_weights=head_weights,
        other_weights=max(0.0, graph.numel - sums.matmul - sums.experts - head_weights - held),
        experts=experts,
        flops=sums.flops,
        head_flops=head.flops / positions if head else 0.0,
        attention_flops=sums.attention,
        cached=sums.cached,
        cache_heads=max(1, sums.heads),
        plain=sums.plain,
        looked_up=sums.looked_up,
        kernels=sums.kernels + (1 if head else 0),
        collectives=sums.collectives,
        collective=sums.collective,
        widest=sums.widest,
        outputs=float(head.outputs[0].shape[-1]) if head and head.outputs[0].shape else 0.0,
        encoder=inside,
        cross_flops=sums.cross,
        cross_cached=sums.cross_cached,
        is_fixed=encoder is not None and not encoder.takes_tokens,
    )


def _encoder(inner: _Sums, decoder: _Sums, found: Encoder) -> Served:
    """The encoder's sums, a position each; collectives are shared out by the matmuls of each side."""
    share = inner.kernels / max(1, inner.kernels + decoder.kernels)
    collectives = round(decoder.collectives * share)
    decoder.collectives -= collectives
    return Served(
        decodes=False, length=found.length, matmul_weights=inner.matmul + inner.experts, head_weights=0.0, other_weights=0.0,
        experts=None, flops=inner.flops + inner.expert_flops, head_flops=0.0, attention_flops=inner.attention, cached=0.0,
        cache_heads=1, plain=inner.plain, looked_up=inner.looked_up, kernels=inner.kernels, collectives=collectives,
        collective=decoder.collective, widest=inner.widest, outputs=0.0,
    )  # fmt: skip


def _numel(names: Iterable[str], specs: Mapping[str, ParameterSpec]) -> int:
    """Elements of the matrices among the parameters `names`."""
    return sum(specs[n].numel for n in names if n in specs and len(specs[n].shape) >= 2)


def _head(graph: Graph, specs: Mapping[str, ParameterSpec]) -> Operator | None:
    """The last matmul with weights."""
    for segment in reversed(graph.segments):
        for op in reversed(segment.operators):
            if op.kind == "matmul" and _numel(op.parameters, specs):
                return op
    return None


def _decodes(graph: Graph, head: Operator | None, specs: Mapping[str, ParameterSpec], *, crosses: bool) -> bool:
    """Token ids in, scores over the same vocabulary out at every position, and no mask from outside in an attention.

    A mask that is an input of the model says which positions are padding: models that see both ways take one. Models that
    are masked by something the graph does not show (a flag of the fused kernel) cannot be told apart: they are taken to
    decode. A decoder that `crosses` to an encoder always does.
    """
    if head is None or graph.tokens_per_sample <= 1 or not head.outputs:
        return False
    if crosses:
        return head.outputs[0].numel > head.outputs[0].shape[-1] * graph.batch
    operators = [op for s in graph.segments for op in s.operators]
    rows = {specs[n].shape[0] for op in operators if op.kind == "embedding" for n in op.parameters if n in specs}
    out = head.outputs[0]
    if out.shape[-1] not in rows or out.numel != out.shape[-1] * graph.batch * graph.tokens_per_sample:
        return False
    looked = {x.name for op in operators if op.kind == "embedding" for x in op.inputs}
    outside = {x.name for x in graph.inputs} - looked
    for op in operators:
        if op.kind != "loss" and any(x.name in outside for x in op.inputs):
            outside |= {x.name for x in op.outputs}
        if op.kind == "attention" and any(x.name in outside for x in op.inputs[3:]):
            return False
    return True


def _collectives(sums: _Sums, graph: Graph, specs: dict[str, ParameterSpec], positions: int) -> None:
    """Adds the all-reduces of tensor parallelism, as the training cost model places them."""
    split = Split(samples=float(graph.batch), tp=2, precision="bf16")
    seen: dict[int, tuple[float, ...]] = {}
    for segment in graph.segments:
        if segment.equals not in seen:
            seen[segment.equals] = segment_work(graph, graph.segments[segment.equals], split, specs).tp_forward
        sums.collectives += len(seen[segment.equals])
        widths = [x / 2 / positions for x in seen[segment.equals] if x > 0]
        # The narrowest: what the experts of a token make is added up before it is sent.
        sums.collective = min([*widths, *([sums.collective] if sums.collective else [])], default=0.0)


def _count(graph: Graph, specs: Mapping[str, ParameterSpec], head: Operator | None, encoder: Encoder | None, *,
           decodes: bool, positions: int) -> tuple[_Sums, _Sums]:  # fmt: skip
    """Sums over all operators up to the output projection: of the decoder (of everything), and of the encoder."""
    outer, inner, carried, counted = _Sums(), _Sums(), _Carried(), set[str]()
    inside = encoder.operators if encoder else frozenset[int]()
    crosses = encoder.crosses if encoder else frozenset[int]()
    own = graph.batch * (encoder.length if encoder else 1)
    for place, (segment, op) in enumerate((s, op) for s in graph.segments for op in s.operators):
        if op is head:
            break
        if op.kind == "loss":
            continue
        sums, count = (inner, own) if place in inside else (outer, positions)
        pairs = count * count // graph.batch if decodes else graph.batch
        names = carried.parameters(op)
        if segment.equals != segment.index and not set(op.parameters) <= set(segment.parameters):
            counted.difference_update(op.parameters)  # a record that several segments share: the weights are others
        is_linear = op.kind in ("matmul", "conv") and _numel(names, specs) > 0
        carried.add(op, names, is_linear=is_linear)
        moved = sum(
            x.numel for x in (*op.inputs, *op.outputs) if x.dtype in _FLOATS and not _is_weight(x, names, specs)
        )
        if op.kind in ("view", "random"):
            continue
        if is_linear:
            fresh = float(_numel((n for n in names if n not in counted), specs))
            counted.update(names)
            sums.kernels += 1
            sums.widest = max(sums.widest, moved / count)
            if "grouped_mm" in op.target:
                _add_experts(sums, op, names, specs, fresh, tokens=count if decodes else graph.batch * graph.tokens_per_sample,
                             positions=count)  # fmt: skip
            else:
                sums.matmul += fresh
                sums.flops += op.flops / count
        elif op.kind in ("attention", "matmul"):
            if op.flops > 0:
                sums.kernels += 1
                if place in crosses:
                    sums.cross += op.flops / (positions * own / graph.batch)
                    sums.cross_cached += _cached_of(op, carried) / own
                else:
                    sums.attention += op.flops / pairs
                    if decodes and place not in inside:
                        _add_cached(sums, op, carried, count)
        elif op.kind == "embedding":
            sums.looked_up += sum(x.numel for x in op.outputs) / count
        elif any(x.dtype in _FLOATS for x in op.outputs):
            sums.plain += moved / count
            sums.widest = max(sums.widest, moved / count)
    return outer, inner


def _add_experts(sums: _Sums, op: Operator, names: tuple[str, ...], specs: Mapping[str, ParameterSpec], fresh: float, *,
                 tokens: int, positions: int) -> None:  # fmt: skip
    """Adds a matmul of which every row meets one expert's weights."""
    spec = next((specs[n] for n in names if n in specs and len(specs[n].shape) == 3), None)
    sums.experts += fresh
    sums.expert_flops += op.flops / positions
    sums.expert_count = max(sums.expert_count, spec.shape[0] if spec else 1)
    rows = op.inputs[0].numel / op.inputs[0].shape[-1] if op.inputs and op.inputs[0].shape else tokens
    sums.expert_active = max(sums.expert_active, rows / tokens)


def _add_cached(sums: _Sums, op: Operator, carried: _Carried, tokens: int) -> None:
    """Adds the keys and values of an attention, or the second operand of one half of an unfused one."""
    kept = _cached_of(op, carried) / tokens
    if kept <= 0:
        return
    sums.cached += kept
    width = op.gemm[3] if _is_fused(op) and op.gemm else 0
    if width:
        sums.heads = min(sums.heads, max(1, int(kept / 2 / width + 1e-9)))


def _is_fused(op: Operator) -> bool:
    return op.kind == "attention" and len(op.inputs) >= 3


def _cached_of(op: Operator, carried: _Carried) -> float:
    """Elements of the keys and values of an attention, or of the second operand of one half of an unfused one."""
    return carried.cached(*(op.inputs[1:3] if _is_fused(op) else op.inputs[-1:]))


def _is_weight(x: TensorSpec, names: tuple[str, ...], specs: Mapping[str, ParameterSpec]) -> bool:
    return any(n in specs and sorted(specs[n].shape) == sorted(x.shape) for n in names)
