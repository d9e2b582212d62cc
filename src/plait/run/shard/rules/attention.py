"""Scaled dot product attention on sharded heads (or any other batch dim)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from plait.run.shard.local import forked_random, shared_heads_attention
from plait.run.shard.operation import Op, Refusal, Step, shape_of
from plait.run.shard.placement import COPIED, Placement, Sharded
from plait.run.shard.rules.pointwise import is_idle
from plait.run.shard.rules.table import rule

__all__: list[str] = []

aten: Any = torch.ops.aten


@rule("scaled_dot_product_attention")
def attention(op: Op) -> Step | Refusal:
    """Attention: heads are independent; grouped queries need the key heads they share."""
    query, key, value, mask = (op[name] for name in ("query", "key", "value", "attn_mask"))
    found = [(n, p) for n in (query, key, value) if isinstance(p := op.at(n), Sharded)]
    if not found:
        # A sharded mask alone (a bias by head) is no reason to split.
        return Refusal("only the mask of the attention is sharded", mask)
    node, placement = found[0]
    rank = len(op.shape)
    dim = placement.dim
    if dim >= rank - 2 or len(shape_of(node)) != rank:
        return Refusal("attention along the sharded dim", node)
    heads, key_heads = shape_of(query)[dim], shape_of(key)[dim]
    wanted: dict[fx.Node | None, Placement] = {}
    extra: dict[str, Any] = {}
    target = op.node.target
    if heads == key_heads:
        out = placement
        wanted |= {query: placement, key: placement, value: placement}
    else:
        query_split = op.at(query)
        repeats = heads // key_heads
        if not isinstance(query_split, Sharded) or len(query_split.parts) > 1 or query_split.period != heads:
            return Refusal("grouped queries whose heads are whole", node)
        out = query_split
        narrow = query_split.scaled(1, repeats, op.tp)
        wanted[query] = query_split
        if narrow is not None:
            wanted |= {key: narrow, value: narrow}
        elif query_split.is_even(op.tp) and repeats % (heads // op.tp) == 0:
            # Fewer key heads than ranks: each rank takes the one that its queries share.
            wanted |= {key: COPIED, value: COPIED}
            target = shared_heads_attention
            extra = {"dim": dim, "heads": key_heads}
        else:
            return Refusal(f"{key_heads} key heads do not divide by {op.tp}", query)
    if mask is not None:
        own = dim - (rank - len(shape_of(mask)))
        whole = own < 0 or shape_of(mask)[own] == 1
        wanted[mask] = COPIED if whole else out.moved(own)
    random = not is_idle(op)
    if target is op.node.target and not random:
        return op.step(out, wanted)
    leading: tuple[Any, ...] = ()
    if random:
        leading = (target,)
    return op.step(
        out,
        wanted,
        target=forked_random if random else target,
        leading=leading,
        patch=lambda where: (
            (extra | {"place": (where.rank, where.tp)} if extra else {}) | ({"rank": where.rank} if random else {})
        ),
    )
