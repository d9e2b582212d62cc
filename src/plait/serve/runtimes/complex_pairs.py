"""Complex numbers as pairs of real ones, for runtimes that have none: a rotary embedding is often written in them.

Each complex tensor becomes a real one with a last dimension of two; a program whose inputs or outputs are complex, or that does something
else with such numbers than what is here, stays as it is.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from plait.serve.runtimes.casting import open_dims

__all__ = ["in_pairs"]


class _Pair:
    """A complex tensor: its real and imaginary parts lie along the last dimension."""

    def __init__(self, parts: torch.Tensor) -> None:
        self.parts = parts

    @property
    def real(self) -> torch.Tensor:
        return self.parts.select(-1, 0)

    @property
    def imag(self) -> torch.Tensor:
        return self.parts.select(-1, 1)

    def dim(self) -> int:
        return self.parts.dim() - 1


def in_pairs(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program in real numbers alone; the one that was given where it has no others, or needs them."""
    nodes = list(program.graph.nodes)
    if not any(_is_complex(node) for node in nodes):
        return program
    outputs = next(node for node in nodes if node.op == "output").all_input_nodes
    given = [node for node in nodes if node.name in program.graph_signature.user_inputs]
    if any(map(_is_complex, (*outputs, *given))):
        return program
    try:
        module: Any = _InPairs(program.module(check_guards=False), [node.name for node in given])
        with torch.no_grad():
            return torch.export.export(
                module, tuple(program.example_inputs[0]), dynamic_shapes=open_dims(program), strict=False
            )
    except Exception:  # no such operator here, or nothing that torch exports: the runtime says what it lacks
        return program


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


class _UnknownError(Exception):
    """An operator on complex numbers that is not here."""


class _InPairs(nn.Module):
    """A program's module whose operators are gone through one by one."""

    def __init__(self, module: fx.GraphModule, names: Sequence[str]) -> None:
        super().__init__()
        if any(value.is_complex() for value in module.parameters()):
            raise _UnknownError
        self.module = module
        self.pairs = {name for name, value in module.named_buffers() if value.is_complex()}
        for name in self.pairs:
            owner, _, own = name.rpartition(".")
            parts = torch.view_as_real(module.get_buffer(name).resolve_conj()).clone()
            module.get_submodule(owner).register_buffer(own, parts, persistent=False)

        def forward(*inputs: torch.Tensor) -> Any:
            return _Through(self.module, self.pairs).run(*inputs)

        # The names that the program's inputs have, which torch.export takes from the signature.
        places = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        forward.__signature__ = inspect.Signature(places)  # type: ignore[attr-defined]
        self.forward = forward


class _Through(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, pairs: set[str]) -> None:
        super().__init__(module)
        self._pairs = pairs

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return _Pair(value) if target in self._pairs else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(target)
        makes = _MAKING.get(name)
        if makes is not None:
            return makes(*args, **kwargs)
        if not any(isinstance(value, _Pair) for value in pytree.tree_leaves((args, kwargs))):
            found = super().call_function(target, args, kwargs)
            if any(isinstance(value, torch.Tensor) and value.is_complex() for value in pytree.tree_leaves(found)):
                raise _UnknownError(name)
            return found
        if name == "aten._assert_tensor_metadata.default":
            return None
        function = _OF_PAIRS.get(name)
        if function is None:
            raise _UnknownError(name)
        return function(*args, **kwargs)


def _pair(real: torch.Tensor, imag: torch.Tensor) -> _Pair:
    return _Pair(torch.stack([real, imag], -1))


def _polar(size: torch.Tensor, angle: torch.Tensor) -> _Pair:
    return _pair(size * torch.cos(angle), size * torch.sin(angle))


def _mul(x: Any, y: Any) -> _Pair:
    if isinstance(x, _Pair) and isinstance(y, _Pair):
        return _pair(x.real * y.real - x.imag * y.imag, x.real * y.imag + x.imag * y.real)
    pair, other = (x, y) if isinstance(x, _Pair) else (y, x)
    if isinstance(other, complex):
        return _mul(pair, _pair(torch.full_like(pair.real, other.real), torch.full_like(pair.real, other.imag)))
    return _Pair(pair.parts * (other.unsqueeze(-1) if isinstance(other, torch.Tensor) else other))


def _div(x: Any, y: Any) -> _Pair:
    if isinstance(y, (_Pair, complex)):
        raise _UnknownError("a quotient of complex numbers")
    return _Pair(x.parts / (y.unsqueeze(-1) if isinstance(y, torch.Tensor) else y))


def _sum_of(sign: Callable[[Any, Any], Any]) -> Callable[..., _Pair]:
    def of(x: Any, y: Any, *, alpha: Any = 1) -> _Pair:
        if alpha != 1 or not (isinstance(x, _Pair) and isinstance(y, _Pair)):
            raise _UnknownError("a sum of a complex and a real number")
        return _pair(sign(x.real, y.real), sign(x.imag, y.imag))

    return of


def _abs(x: _Pair) -> torch.Tensor:
    return torch.sqrt(x.real * x.real + x.imag * x.imag)


def _conj(x: _Pair) -> _Pair:
    return _pair(x.real, -x.imag)


def _shape(x: _Pair, size: Sequence[Any]) -> _Pair:
    return _Pair(x.parts.reshape([*size, 2]))


def _expand(x: _Pair, size: Sequence[Any], **_: Any) -> _Pair:
    return _Pair(x.parts.expand([*size, 2]))


def _permute(x: _Pair, dims: Sequence[int]) -> _Pair:
    return _Pair(x.parts.permute([*(dim % x.dim() for dim in dims), x.dim()]))


def _index(x: _Pair, indices: Sequence[Any]) -> _Pair:
    if any(isinstance(index, _Pair) for index in indices):
        raise _UnknownError("an index that is complex")
    return _Pair(torch.ops.aten.index.Tensor(x.parts, list(indices)))


def _along(function: Callable[..., torch.Tensor], more: int = 0) -> Callable[..., _Pair]:
    """Of operators whose first argument is a dimension; `more`: one where it may be behind the last."""

    def moved(x: _Pair, dim: int = 0, *args: Any, **kwargs: Any) -> _Pair:
        return _Pair(function(x.parts, dim % (x.dim() + more), *args, **kwargs))

    return moved


def _transpose(x: _Pair, one: int, other: int) -> _Pair:
    return _Pair(x.parts.transpose(one % x.dim(), other % x.dim()))


def _flatten(x: _Pair, start: int = 0, end: int = -1) -> _Pair:
    return _Pair(x.parts.flatten(start % x.dim(), end % x.dim()))


def _cat(values: Sequence[Any], dim: int = 0) -> _Pair:
    if not all(isinstance(value, _Pair) for value in values):
        raise _UnknownError("complex and real numbers joined")
    return _Pair(torch.cat([value.parts for value in values], dim % values[0].dim()))


def _same(x: _Pair, *_: Any, **__: Any) -> _Pair:
    return x


_ATEN = torch.ops.aten
_MAKING: Mapping[str, Callable[..., Any]] = {
    "aten.view_as_complex.default": _Pair,
    "aten.polar.default": _polar,
    "aten.complex.default": _pair,
}
_OF_PAIRS: Mapping[str, Callable[..., Any]] = {
    "aten.view_as_real.default": operator.attrgetter("parts"),
    "aten.real.default": operator.attrgetter("real"),
    "aten.imag.default": operator.attrgetter("imag"),
    "aten.abs.default": _abs,
    "aten.conj.default": _conj,
    "aten._conj.default": _conj,
    "aten.resolve_conj.default": _same,
    "aten.mul.Tensor": _mul,
    "aten.mul.Scalar": _mul,
    "aten.mul_.Tensor": _mul,
    "aten.div.Tensor": _div,
    "aten.div.Scalar": _div,
    "aten.add.Tensor": _sum_of(operator.add),
    "aten.sub.Tensor": _sum_of(operator.sub),
    "aten.neg.default": lambda x: _Pair(-x.parts),
    "aten.view.default": _shape,
    "aten.reshape.default": _shape,
    "aten.expand.default": _expand,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.flatten.using_ints": _flatten,
    "aten.unsqueeze.default": _along(_ATEN.unsqueeze.default, 1),
    "aten.squeeze.dim": _along(_ATEN.squeeze.dim),
    "aten.slice.Tensor": _along(_ATEN.slice.Tensor),
    "aten.select.int": _along(_ATEN.select.int),
    "aten.index_select.default": _along(_ATEN.index_select.default),
    "aten.index.Tensor": _index,
    "aten.cat.default": _cat,
    "aten.clone.default": _same,
    "aten.contiguous.default": _same,
    "aten.detach.default": _same,
    "aten.alias.default": _same,
    "aten.lift_fresh_copy.default": _same,
    "aten.sym_size.int": lambda x, dim: x.parts.shape[dim % x.dim()],
}
