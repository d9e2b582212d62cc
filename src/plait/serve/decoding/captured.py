"""A decoder's forward, captured as `tokens [batch, length] -> logits` with an open length."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from plait.capture.trace import _masks_unread, _no_noise, call_model, user_line
from plait.errors import ServeError
from plait.serve.decoding.generate import all_inputs, roles_of
from plait.serve.decoding.positions import is_users, line_of, size_of

__all__ = ["Logits", "call_of", "is_last_alone", "program_of"]

Logits = Callable[[torch.Tensor], torch.Tensor]
"""tokens [batch, length] -> [batch, length, vocabulary], or [batch, 1, vocabulary] of the last position alone."""

_ELSE = "generate with the exported forward, which recomputes the prefix"


class _Tokens(nn.Module):
    """The model with tokens alone as its input, and its logits as its output."""

    def __init__(self, model: nn.Module, call: Logits) -> None:
        super().__init__()
        self.model = model
        self._call = (call,)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor]:
        """Logits, of all positions or of the last."""
        return (self._call[0](tokens),)


def call_of(module: nn.Module, inputs: Any) -> Logits:
    """logits(tokens), whatever the inputs' and the outputs' structure.

    Raises:
        ServeError: there are other inputs than tokens, a mask of ones and positions; or no output is logits.
    """
    leaves, spec = torch.utils._pytree.tree_flatten(inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    roles = roles_of([leaves[i] for i in places])
    if roles is None:
        shown = ", ".join(f"{leaves[i].dtype} {list(leaves[i].shape)}" for i in places)
        raise ServeError(
            f"decode: a decoder is served tokens [batch, length], beside them at most a mask of ones and positions from 0; "
            f"{type(module).__name__} takes {shown or 'no tensor'}",
            hint="export without --max-length",
        )
    dtypes = [leaves[i].dtype for i in places]

    def call(tokens: torch.Tensor) -> torch.Tensor:
        own = list(leaves)
        for i, tensor in zip(places, all_inputs(roles, dtypes, tokens), strict=True):
            own[i] = tensor
        logits = _logits_in(call_model(module, torch.utils._pytree.tree_unflatten(own, spec)))
        if logits is None:
            raise ServeError(f"decode: {type(module).__name__} gives no logits [batch, length, vocabulary]")
        return logits

    return call


def _logits_in(outputs: Any) -> torch.Tensor | None:
    if isinstance(outputs, dict) and "logits" in outputs:
        outputs = [outputs["logits"]]
    values = (
        outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple | list) else [outputs]
    )
    found = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    whole = [v for v in found if v.dim() == 3] + [v[:, None] for v in found if v.dim() == 2]
    return whole[0] if whole else None


def is_last_alone(call: Logits) -> bool:
    """Whether a model gives the logits of the last position alone, as a forward for inference may."""
    with torch.no_grad():
        return call(torch.zeros(2, 3, dtype=torch.int64)).shape[1] == 1


def program_of(module: nn.Module, call: Logits, capacity: int, most: int) -> tuple[torch.export.ExportedProgram, int]:
    """The captured forward, and the least length that it is right for; the largest is `capacity`.

    A model that takes positions block by block has another graph for every number of blocks: it is captured with as many as
    the capacity has.

    Raises:
        ServeError: it does not run at the capacity, cannot be captured, or its length is fixed; with the user's line.
    """
    within = "--max-length must be within the model's own positions"
    try:
        with torch.no_grad():
            call(torch.zeros(1, capacity, dtype=torch.int64))
    except ServeError:
        raise
    except Exception as problem:
        raise _not_run("the model does not run", problem, capacity, within) from None
    # Not at the capacity itself: a table of so many positions would fix the length to it.
    tries = dict.fromkeys((max(3, capacity // 2 + 1), max(3, capacity - 1), capacity))
    for length in tries:
        program = _exported(module, call, length, capacity, most)
        least, largest = _lengths(program, length)
        if least < largest >= capacity:
            return program, least
        if least == largest and length == next(iter(tries)):
            break
    raise _fixed(program, least, largest, capacity)


def _exported(module: nn.Module, call: Logits, length: int, capacity: int, most: int) -> torch.export.ExportedProgram:
    tokens = torch.zeros(2, length, dtype=torch.int64)
    shapes = {"tokens": {0: Dim.AUTO(max=most), 1: Dim.AUTO(max=capacity)}}
    hint = f"let no control flow depend on tensors' values (use torch.where), or {_ELSE}"
    try:
        with torch.no_grad(), _no_noise(), _masks_unread():
            return torch.export.export(_Tokens(module, call).eval(), (tokens,), dynamic_shapes=shapes, strict=False)
    except ServeError:
        raise
    except Exception as problem:
        raise _not_run("torch.export cannot capture the model", problem, length, hint) from None


def _not_run(what: str, problem: Exception, length: int, hint: str) -> ServeError:
    text = (str(problem).strip().splitlines() or [""])[0][:200]
    return ServeError(f"decode: {what} at {length} positions: {text}\n\n  {user_line(problem)}", hint=hint)


def _tokens_of(program: torch.export.ExportedProgram) -> torch.Tensor:
    value: torch.Tensor = next(
        n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name == "tokens"
    )
    return value


def _lengths(program: torch.export.ExportedProgram, at: int) -> tuple[int, int]:
    """The least and the largest length that a program captured `at` a length is right for."""
    value = _tokens_of(program)
    length: Any = size_of(value.shape[1])
    if isinstance(length, int):
        return length, length
    limits = program.range_constraints[length]
    # What Python asked of sizes on the way: how many blocks there are, say. That sizes differ is asked for layouts alone.
    asked = [g.expr for g in _shapes_of(value).guards if getattr(g.expr, "rel_op", "") != "!="]
    batch: Any = size_of(value.shape[0])
    known = {symbol: 2 for symbol in [batch] if not isinstance(symbol, int)}
    asked = [expr for expr in asked if expr.free_symbols <= {length, *known} and length in expr.free_symbols]

    def holds(n: int) -> bool:
        return all(bool(expr.subs({**known, length: n})) for expr in asked)

    least, largest = int(limits.lower), int(limits.upper)
    least += bisect_left(range(least, at), True, key=holds)
    largest = at + bisect_left(range(at + 1, largest + 1), True, key=lambda n: not holds(n))
    return least, largest


def _shapes_of(value: torch.Tensor) -> Any:
    return value.fake_mode.shape_env  # type: ignore[attr-defined]


def _fixed(program: torch.export.ExportedProgram, least: int, largest: int, capacity: int) -> ServeError:
    """A length that the model's Python made a number: a loop over positions, as scans are written."""
    value = _tokens_of(program)
    if least < largest:
        return ServeError(
            f"decode: as captured the model takes {least} to {largest} positions and not {capacity}, since its Python works "
            f"block by block or chooses by their number\n\n  {_busiest_line(program)}",
            hint=f"ask for a --max-length that is whole blocks; or {_ELSE}",
        )
    where = _fixed_at(value, largest) or _busiest_line(program)
    return ServeError(
        f"decode: torch.export fixed the model's length to {largest}, so no step at one position can be derived: its Python "
        f"loops over positions or reads their number, or an operator does when it is taken apart\n\n  {where}",
        hint="write x.shape[0] where len(x) or int(...) makes a number of it; a scan over positions has a state of its own, "
        "which is no key-value cache: generate with the exported forward",
    )


def _fixed_at(value: torch.Tensor, length: int) -> str:
    """The user's line at which export made the length a number; empty where it does not know."""
    shapes = _shapes_of(value)
    for symbol, place in getattr(shapes, "replacements_slocs", {}).items():
        frame = place.framework_loc
        if shapes.replacements.get(symbol) != length:
            continue
        if place.maybe_user_loc and is_users(str(place.maybe_user_loc)):
            return str(place.maybe_user_loc)
        if hasattr(frame, "lineno") and is_users(frame.filename):
            return f'File "{frame.filename}", line {frame.lineno}, in {frame.name} {frame.line or ""}'
    return ""


def _busiest_line(program: torch.export.ExportedProgram) -> str:
    """The user's line that most operators come from: a loop repeats what is in it."""
    lines = Counter(line_of(node) for node in program.graph.nodes if node.op == "call_function")
    return lines.most_common(1)[0][0] if lines else ""
