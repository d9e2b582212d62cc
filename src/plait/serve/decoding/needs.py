"""What an operator takes of its inputs to give its result at one position.

`need(source, node, view)` answers for one operator and one view of its result (`positions.View`: which dims hold one
position, the rest hold all). None means that the operator mixes positions along such a dim: then its result is
computed at all positions and the row taken. An operator without a rule is taken to mix whatever positions it sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from plait.serve.decoding import lookups, rules
from plait.serve.decoding.positions import ALL, Positions, View, kind_of
from plait.serve.decoding.rules import Need, Rule

__all__ = ["Need", "need"]


def need(source: Positions, node: fx.Node, view: View) -> Need | None:
    """The views of a node's inputs that give `view` of it; None: only all positions at once give it."""
    if view == ALL:
        return Need(dict.fromkeys((path for path, _ in rules.tensors_in(source, node)), ALL))
    rule = _RULES.get(kind_of(node).rstrip("_")) or _RULES.get(kind_of(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = rules.aligned
    return (rule or rules.unknown)(source, node, view)


def _item(source: Positions, node: fx.Node, view: View) -> Need | None:
    """One of several results."""
    parent: Any = node.args[0]
    if source.dims(parent) == source.dims(node):
        return Need({(0,): view}) if need(source, parent, view) is not None else None
    return Need({(0,): source.one(parent)}) if view == source.one(node) else None


def _table(*entries: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in entries for name in names.split()}


_RULES = _table(
    (
        rules.aligned,
        (
            "where masked_fill to _to_copy clone contiguous alias detach dropout type_as zeros_like ones_like full_like "
            "empty_like lift_fresh_copy complex polar conj _conj resolve_conj prelu layer_norm rms_norm _fused_rms_norm "
            "native_layer_norm batch_norm native_dropout alpha_dropout feature_dropout hardswish log_sigmoid floor_divide "
            "fill copy bucketize __and__ __or__ __xor__ special_expit subtract multiply divide true_divide negative absolute "
            "clip greater greater_equal less less_equal not_equal"
        ),
    ),
    (rules.repeated, "expand repeat broadcast_to expand_as"),
    (
        rules.laid_out,
        "reshape view _unsafe_view flatten unflatten unsqueeze squeeze view_as_complex view_as_real one_hot",
    ),
    (rules.permuted, "permute transpose swapaxes swapdims t mT numpy_T adjoint movedim"),
    (
        rules.along,
        (
            "softmax _softmax log_softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin topk sort argsort gather "
            "scatter scatter_add scatter_reduce index_add index_copy index_fill cat flip roll slice narrow split "
            "split_with_sizes chunk unbind select glu repeat_interleave slice_scatter select_scatter take_along_dim stack "
            "unsafe_split unsafe_chunk tensor_split diff"
        ),
    ),
    (rules.padded, "constant_pad_nd pad"),
    (
        rules.reduced,
        (
            "sum mean amax amin max min argmax argmin var std logsumexp norm any all prod var_mean std_mean "
            "linalg_vector_norm median nansum count_nonzero"
        ),
    ),
    (rules.product, "matmul mm bmm addmm baddbmm"),
    (rules.linear, "linear"),
    (rules.convolved, "conv1d"),
    (rules.einsum, "einsum"),
    (rules.attention, "scaled_dot_product_attention"),
    (lookups.embedded, "embedding"),
    (lookups.indexed, "index"),
    (lookups.selected, "index_select"),
    (rules.filled, "full zeros ones empty new_full new_zeros new_ones new_empty"),
    (_item, "getitem"),
)
"""Operator -> its rule; those that act element by element carry torch's own mark."""
