"""Where a model can be cut: between operators where few bytes are live, at the borders of the user's own blocks.

A decoder falls apart at its layers, a U-Net at its blocks (with the skips live in between), a plain chain at every
operator. Nothing here knows a layer's name: the borders come from the live tensors, and among equally narrow places
those win where the user's modules change at the shallowest level.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import torch
from torch import fx

from plait.capture.prelude import preludes, written_by
from plait.capture.program import Program
from plait.capture.work import flops_of, module_path

__all__ = ["ENOUGH", "live_at", "mark_segments"]

ENOUGH = 8
"""Cuts are taken level by level of the module tree until there are this many segments."""

MOST = 256
"""More segments than this are merged to about equal shares of work: a pipeline needs no finer grain."""


def live_at(program: Program) -> list[set[fx.Node]]:
    """For every position i in the graph's node list, the values made before node i and needed at or after it.

    Parameters and what `preludes` can make anew are not counted.
    """
    nodes = list(program.module.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    free = preludes(program) | {n for n in nodes if n.op in ("placeholder", "get_attr")}
    starts: dict[int, list[fx.Node]] = defaultdict(list)
    ends: dict[int, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        if node in free or node.op == "output" or not node.users:
            continue
        starts[order[node]].append(node)
        ends[max(order[user] for user in node.users)].append(node)
    live: set[fx.Node] = set()
    result: list[set[fx.Node]] = []
    for i in range(len(nodes)):
        result.append(set(live))
        live |= set(starts[i])
        live -= set(ends[i])
    return result


def _bytes(nodes: set[fx.Node]) -> int:
    return sum(spec.nbytes for node in nodes for spec in node.meta.get("specs", ()))


def mark_segments(program: Program) -> None:
    """Sets `meta["segment"]` on every node (placeholders and preludes: -1)."""
    nodes = list(program.module.graph.nodes)
    free = preludes(program) | {n for n in nodes if n.op in ("placeholder", "get_attr")}
    live = live_at(program)
    cuts = set(_choose(nodes, free, live, _barred(program, nodes, live)))
    segment = 0
    for i, node in enumerate(nodes):
        if i in cuts:
            segment += 1
        node.meta["segment"] = -1 if node in free else segment


def _barred(program: Program, nodes: list[fx.Node], live: list[set[fx.Node]]) -> set[int]:
    """Positions where a cut would part what is one memory.

    A view of a parameter is not carried over: FSDP frees the whole parameter behind its segment. Of several live
    views of a memory that is written later, the copies on the other side would not see the write. A buffer (or an
    input) that is written has all its uses on one side.
    """
    places = program.placeholders
    parameters: set[int] = set()
    for node in nodes:
        if node.op == "placeholder" and places[node.name].kind == "parameter":
            parameters |= node.meta["storages"]
    written: dict[int, int] = {}
    for i, node in enumerate(nodes):
        for argument in written_by(node):
            written |= dict.fromkeys(argument.meta["storages"], i)
    barred: set[int] = set()
    order = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        if node.op == "placeholder" and node.users and node.meta.get("storages", frozenset()) & written.keys():
            uses = [order[user] for user in node.users]
            barred.update(range(min(uses) + 1, max(uses) + 1))
    for i, values in enumerate(live):
        storages = [s for node in values for s in node.meta.get("storages", ())]
        twice = {s for s in storages if storages.count(s) > 1} if len(set(storages)) < len(storages) else set()
        if parameters.intersection(storages) or any(written.get(s, -1) >= i for s in twice):
            barred.add(i)
    return barred


def _choose(nodes: list[fx.Node], free: set[fx.Node], live: list[set[fx.Node]], barred: set[int]) -> list[int]:
    """Positions to cut in front of: level by level of the module tree, inside what still holds too much work."""
    work = [i for i, node in enumerate(nodes) if node not in free and node.op == "call_function"]
    by_depth: dict[int, list[int]] = defaultdict(list)
    for position, depth in _narrow(nodes, work, live, barred):
        by_depth[depth].append(position)
    running = [0.0]
    for node in nodes:
        running.append(running[-1] + flops_of(node).forward + sum(spec.numel for spec in node.meta.get("specs", ())))
    total = running[-1]
    chosen: list[int] = []
    for depth in sorted(by_depth):
        bounds = [0, *chosen, len(nodes)]
        shares = {(a, b): (running[b] - running[a]) / total for a, b in pairwise(bounds)}
        if sum(share > 1 / (4 * ENOUGH) for share in shares.values()) >= ENOUGH:
            shares = {key: share for key, share in shares.items() if share > 2 / ENOUGH}
        large = [key for key, share in shares.items() if share > 1 / ENOUGH or len(chosen) + 1 < ENOUGH]
        chosen = sorted(chosen + [p for p in by_depth[depth] if any(a < p < b for a, b in large)])
    return _thin(_without_trifles(nodes, chosen, running), MOST)


def _without_trifles(nodes: list[fx.Node], cuts: list[int], running: list[float]) -> list[int]:
    """Drop cuts after (or, at the end, before) a segment with no parameter and next to no work."""
    kept: list[int] = []
    for cut, following in pairwise([*cuts, len(nodes)]):
        rest = nodes[cut:following]
        uses_parameter = any(p.op == "placeholder" and p.meta.get("parameter") for n in rest for p in n.all_input_nodes)
        if uses_parameter or (running[following] - running[cut]) > running[-1] / 1000:
            kept.append(cut)
    return kept


def _thin(cuts: list[int], most: int) -> list[int]:
    if len(cuts) < most:
        return cuts
    step = len(cuts) / (most - 1)
    return sorted({cuts[int(i * step)] for i in range(most - 1)})


def _narrow(nodes: list[fx.Node], work: list[int], live: list[set[fx.Node]], barred: set[int]) -> list[tuple[int, int]]:
    """(position, module depth) of the local minima of the live bytes and of single live tensors.

    Of a plateau, each change of module.
    """
    found: list[tuple[int, int]] = []
    sizes = [_bytes(live[i]) for i in work]
    sizes[0:1] = [2**62]
    start = 1
    while start < len(work):
        stop = start
        while stop + 1 < len(work) and sizes[stop + 1] == sizes[start]:
            stop += 1
        lower_before = sizes[start - 1] < sizes[start]
        lower_after = stop + 1 < len(work) and sizes[stop + 1] < sizes[start]
        tail_is_output = stop + 1 >= len(work) and sizes[start] == 0
        narrow = not lower_before and not lower_after
        if (narrow or any(len(live[work[k]]) == 1 for k in range(start, stop + 1))) and not tail_is_output:
            places = [k for k in range(start, stop + 1) if work[k] not in barred and _cuttable(live[work[k]])]
            borders = [k for k in places if _is_border(nodes, work, k)]
            if narrow:
                borders = borders or places[-1:]
            else:
                # In a plain chain whose tensors only shrink nothing is a minimum, yet one tensor alone is a waist.
                borders = [k for k in borders if len(live[work[k]]) == 1]
            found += [(work[k], _border(nodes, work, k)) for k in borders]
        start = stop + 1
    return found


def _cuttable(values: set[fx.Node]) -> bool:
    """Only plain tensors can be sent: a list (the result of a chunk, before its getitems) or a size cannot."""
    return all(
        len(node.meta.get("specs", ())) == 1 and isinstance(node.meta.get("val"), torch.Tensor) for node in values
    )


def _is_border(nodes: list[fx.Node], work: list[int], k: int) -> bool:
    """Whether the user's module changes here, or real work begins."""
    before, after = nodes[work[k - 1]], nodes[work[k]]
    return module_path(before) != module_path(after) or flops_of(after).forward > 0


def _border(nodes: list[fx.Node], work: list[int], k: int) -> int:
    """Depth of the innermost user module that the operators on both sides of a place share."""
    before, after = module_path(nodes[work[k - 1]]), module_path(nodes[work[k]])
    depth = 0
    for a, b in zip(before, after, strict=False):
        if a != b:
            break
        depth += 1
    return depth
