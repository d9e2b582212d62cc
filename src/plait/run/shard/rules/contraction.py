"""Matrix products and all that sums over products: one rule on index letters.

A linear layer is `...i, oi -> ...o`. Sharded along a letter that the output has, the result is sharded there; along
one that it sums over, the result is a part of a sum. An operand without the letter is used by every rank for a part
of the result, so its gradient is a part of a sum too (COPIED).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from plait.run.shard.operation import Op, Refusal, Step, shape_of
from plait.run.shard.placement import COPIED, PARTIAL, Placement, Sharded, sharded
from plait.run.shard.rules.table import rule

__all__ = ["contract", "is_matmul", "letters_of"]


@dataclass(frozen=True, slots=True)
class Letters:
    """A contraction: letters of each operand (`None` for a broadcast dim of size 1) and of the output."""

    operands: tuple[tuple[fx.Node, str], ...]
    output: str
    bias: tuple[fx.Node, str] | None = None
    """Added to the result; its letters align with the output's."""
    fixed: str = ""
    """Letters along which nothing can be split."""

    def size(self, letter: str) -> int:
        """Size of the letter's dim."""
        for node, letters in self.operands:
            if letter in letters:
                return shape_of(node)[letters.index(letter)]
        raise KeyError(letter)


_ALPHABET = "abcdefghijklmnop"


def _linear(op: Op) -> Letters:
    x, weight, bias = op["input"], op["weight"], op["bias"]
    lead = _ALPHABET[: len(shape_of(x)) - 1]
    out = "z" if len(shape_of(weight)) == 2 else ""
    return Letters(((x, lead + "y"), (weight, out + "y")), lead + out, (bias, out) if bias is not None else None)


def _matmul(op: Op) -> Letters:
    left, right = [op[name] for name in list(op.args)[:2]]
    a, b = shape_of(left), shape_of(right)
    batch = _ALPHABET[: max(len(a), len(b), 2) - 2]
    ends = ("y" if len(a) == 1 else "xy"), ("y" if len(b) == 1 else "yz")
    left_letters = _broadcast(batch, a[: max(len(a) - 2, 0)]) + ends[0]
    right_letters = _broadcast(batch, b[: max(len(b) - 2, 0)]) + ends[1]
    return Letters(((left, left_letters), (right, right_letters)), batch + ends[0][:-1] + ends[1][1:])


def _broadcast(letters: str, sizes: tuple[int, ...]) -> str:
    taken = letters[len(letters) - len(sizes) :]
    return "".join("." if size == 1 else letter for letter, size in zip(taken, sizes, strict=True))


def _addmm(op: Op) -> Letters | None:
    names = list(op.args)
    bias, left, right = (op[name] for name in names[:3])
    if op["beta"] != 1:
        return None
    batch = "a" if len(shape_of(left)) == 3 else ""
    out = batch + "xz"
    shape = shape_of(bias)
    letters = _broadcast(out, shape)
    return Letters(((left, batch + "xy"), (right, batch + "yz")), out, (bias, letters))


def _einsum(op: Op) -> Letters | None:
    equation, operands = op["equation"].replace(" ", ""), op["tensors"]
    if "." in equation or "->" not in equation:
        return None
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    if any(len(set(term)) != len(term) for term in terms):
        return None
    return Letters(tuple(zip(operands, terms, strict=True)), output)


def _grouped_mm(op: Op) -> Letters | None:
    left, right, offsets = list(op.args.values())[:3]
    if op.args.get("bias") is not None or offsets is None:
        return None
    a, b = len(shape_of(left)), len(shape_of(right))
    # rows x are grouped by expert e: [x, y] @ [e, y, z] -> [x, z]
    if (a, b) == (2, 3):
        return Letters(((left, "xy"), (right, "eyz")), "xz", fixed="xe")
    return None


def _bilinear(op: Op) -> Letters:
    x, y, weight, bias = (op[name] for name in ("input1", "input2", "weight", "bias"))
    lead = _ALPHABET[: len(shape_of(x)) - 1]
    operands = ((x, lead + "u"), (y, lead + "v"), (weight, "zuv"))
    return Letters(operands, lead + "z", (bias, "z") if bias is not None else None)


_READERS = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "einsum": _einsum,
    "_grouped_mm": _grouped_mm,
    "grouped_mm_fallback": _grouped_mm,  # transformers' own operator, where the device has no grouped product
    "bilinear": _bilinear,
}


def _name(target: Any) -> str:
    return str(getattr(getattr(target, "overloadpacket", None), "__name__", ""))


def letters_of(op: Op) -> Letters | None:
    """The index letters of a contraction; None where it has none."""
    reader = _READERS.get(_name(op.node.target))
    return reader(op) if reader else None


def is_product(target: Any) -> bool:
    """Whether an operator is one of the matrix products, in whatever library."""
    return _name(target) in _READERS


def is_matmul(node: fx.Node) -> bool:
    """Whether this is one of the matrix products."""
    return node.op == "call_function" and is_product(node.target)


def column_letter(op: Op, letters: Letters) -> tuple[str, Sharded] | None:
    """The letter along which a product of whole values and a weight can be split, and how."""
    weights = [(n, text) for n, text in letters.operands if n in op.weights]
    others = "".join(text for n, text in letters.operands if n not in op.weights)
    if not op.may_split or len(weights) != 1 or not others:
        return None
    for letter in reversed(weights[0][1]):
        if letter in others or letter not in letters.output or letter in letters.fixed:
            continue
        size = letters.size(letter)
        pattern = op.pattern or sharded(0, (size,), op.tp)
        if size % pattern.period == 0 and pattern.fits(op.tp):
            return letter, pattern
    return None


def contract(op: Op, letters: Letters) -> Step | Refusal:
    """Split a contraction along the letter in which its operands arrive sharded, or along one of its weight's."""
    choice = _arriving(op, letters)
    if choice is None:
        column = column_letter(op, letters)
        if column is None or op.split_operands():
            return op.replicated()
        choice = column
    letter, pattern = choice
    wanted: dict[fx.Node | None, Placement] = {}
    for node, text in letters.operands:
        wanted[node] = pattern.moved(text.index(letter)) if letter in text else COPIED
    out: Placement = pattern.moved(letters.output.index(letter)) if letter in letters.output else PARTIAL
    if letters.bias is not None:
        node, text = letters.bias
        if out is PARTIAL:
            wanted[node] = PARTIAL
        else:
            wanted[node] = pattern.moved(text.index(letter)) if letter in text else COPIED
    return op.step(out, wanted)


def _arriving(op: Op, letters: Letters) -> tuple[str, Sharded] | None:
    found: list[tuple[bool, int, str, Sharded]] = []
    for node, text in letters.operands:
        placement = op.at(node)
        if isinstance(placement, Sharded):
            letter = text[placement.dim]
            if letter not in letters.fixed and letter != ".":
                size = _numel(shape_of(node))
                found.append((letter not in letters.output, size, letter, placement))
    if not found:
        return None
    # Where operands disagree, summing over the sharded letter makes the smallest result; else the largest stays.
    _, _, letter, placement = max(found, key=lambda item: item[:2])
    return letter, placement


def _numel(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


@rule(*_READERS)
def product(op: Op) -> Step | Refusal:
    """Linear layers, matrix products, einsum, grouped products of experts."""
    letters = letters_of(op)
    if letters is None:
        return Refusal("this form of product is not split")
    return contract(op, letters)
