"""Which operators of a model are an encoder: what a decoder attends to and what does not depend on the decoder's tokens.

Cross-attention is found by what its tensors depend on: its queries on token ids that its keys know nothing of. Whatever
depends only on what those keys depend on is the encoder, the projections that make keys and values for the decoder
included: they run once for a prompt. No name is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from plait.schema.graph import Graph, Operator, ParameterSpec

__all__ = ["Encoder", "encoder_of"]


@dataclass(frozen=True, slots=True)
class Encoder:
    """The parts of an encoder-decoder."""

    operators: frozenset[int]
    """Places of the encoder's operators, counted over all of the graph."""
    crosses: frozenset[int]
    """Places of the attentions (of the scores' matmul and the one behind it, where they are not fused) that look at it."""
    length: int
    """Positions of the captured sample that the decoder looks at."""
    takes_tokens: bool
    """Whether it looks its input up in a table; otherwise its length is that of the captured sample."""


def encoder_of(graph: Graph, specs: Mapping[str, ParameterSpec], rows: int) -> Encoder | None:
    """The encoder of a model whose decoder's tokens come from a table of `rows` rows; None where there is none."""
    operators = [op for s in graph.segments for op in s.operators]
    known, needs = _dependencies(graph, operators)
    ids = 0
    for op in operators:
        if op.kind == "embedding" and any(n in specs and specs[n].shape[0] == rows for n in op.parameters):
            ids |= _joined(known, op)
    seen, crosses, length = 0, set[int](), 0
    for place, query, key, positions in _attentions(operators, known):
        if key and query & ids & ~key:
            seen |= key
            crosses.add(place)
            length = length or positions  # scores come first, and end in positions
    if not seen or length < 1 or not ids & ~seen:
        return None
    inside = frozenset(i for i, need in enumerate(needs) if need and not need & ~seen)
    return Encoder(inside, frozenset(crosses), length, bool(ids & seen))


def _dependencies(graph: Graph, operators: list[Operator]) -> tuple[dict[str, int], list[int]]:
    """(inputs of the model that each tensor depends on, as bits; the same for each operator)."""
    known = {spec.name: 1 << i for i, spec in enumerate(graph.inputs)}
    needs = []
    for op in operators:
        need = _joined(known, op)
        needs.append(need)
        known.update({out.name: need for out in op.outputs})
    return known, needs


def _joined(known: Mapping[str, int], op: Operator) -> int:
    need = 0
    for source in op.inputs:
        need |= known.get(source.name, 0)
    return need


def _attentions(operators: list[Operator], known: Mapping[str, int]) -> Iterator[tuple[int, int, int, int]]:
    """(place, what the queries depend on, what the keys or values do, positions that are attended) of each attention."""
    for place, op in enumerate(operators):
        if op.kind == "attention" and len(op.inputs) >= 3 and len(op.inputs[1].shape) >= 2:
            q, k = op.inputs[0], op.inputs[1]
            yield place, known.get(q.name, 0), known.get(k.name, 0), k.shape[-2]  # batch, heads, positions, width
        elif op.kind == "matmul" and not op.parameters and len(op.inputs) >= 2 and op.outputs and op.outputs[0].shape:
            q, k = op.inputs[0], op.inputs[1]
            yield place, known.get(q.name, 0), known.get(k.name, 0), op.outputs[0].shape[-1]
