"""A tape of tensor operations that were not carried out, and can be for one tensor at a time.

Tensors are told apart by storage: an argument is written down as (storage, dtype, size, stride, offset), so that
views, `.data`, `detach` and swapped storages need no entries of their own. An entry points at the entries that last
wrote what it reads; the values of a tensor follow from those behind its storage's last entry, replayed in order:

    w = empty(4, 8)          no entry: a storage nobody has written
    w.uniform_(-1, 1)        entry 0   writes w                    forgotten, since entry 1 overwrites all of w
    w.normal_(0, 0.02)       entry 1   writes w        needs -     holds the generator's state
    w[3].zero_()             entry 2   writes w        needs 1
    v = w * 2                entry 3   writes v        needs 2

Real tensors among the arguments are copied when small; large ones are kept by reference and must not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["DeferredError", "Tape", "View", "plainly"]


class DeferredError(RuntimeError):
    """This model cannot be built without its values; build it whole."""


@dataclass(frozen=True, slots=True)
class View:
    """How a tensor lies in a storage; `offset` and `stride` in elements of `dtype`."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool = False
    neg: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor) -> View:
        """The view that a fake tensor is."""
        return cls(
            tensor.untyped_storage()._cdata,
            tensor.dtype,
            tuple(tensor.size()),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
            tensor.is_conj(),
            tensor.is_neg(),
        )

    def fills(self, nbytes: int) -> bool:
        """Whether it covers every byte of a storage of `nbytes`, each element once."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return self.offset == 0 and expected * self.dtype.itemsize == nbytes

    def read(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The tensor in a real storage."""
        tensor = torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)
        if self.conj:
            tensor = tensor.conj()
        return torch._neg_view(tensor) if self.neg else tensor


@dataclass(frozen=True, slots=True)
class _Constant:
    """A real argument, and its version when it was recorded."""

    tensor: torch.Tensor
    version: int


@dataclass(frozen=True, slots=True)
class _Entry:
    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    """Arguments, flat: `View`, `_Constant` or a plain value."""
    spec: pytree.TreeSpec
    outputs: tuple[View | None, ...]
    """New storages among the flat outputs; None: a view of an argument, or no tensor."""
    needs: tuple[int, ...]
    touched: frozenset[int]
    """Storages read or written."""
    random_state: torch.Tensor | None
    default_dtype: torch.dtype


@contextmanager
def plainly() -> Iterator[None]:
    """No dispatch mode, no function mode, no gradients: operators run as they are."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


class Tape:
    """What was asked of deferred tensors, in order."""

    def __init__(self, small: int) -> None:
        self._small = small
        self._entries: list[_Entry] = []
        self._last_writer: dict[int, int] = {}
        # Storages are known by address, so none may be freed while the tape lives (fake ones hold no memory).
        self._storages: dict[int, torch.UntypedStorage] = {}

    def adopt(self, tensor: torch.Tensor) -> None:
        """Know the storage of a new fake tensor."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage was made under this tape."""
        return tensor.untyped_storage()._cdata in self._storages

    def record(
        self,
        function: Callable[..., Any],
        leaves: Sequence[Any],
        spec: pytree.TreeSpec,
        *,
        outputs: Sequence[Any],
        mutated: frozenset[int],
        overwrites: bool,
        random_state: torch.Tensor | None,
    ) -> None:
        """Write down one operation, unless it only makes views or unset memory.

        `mutated` are the storages written in place; `overwrites` says that the operation sets every element of its
        first argument without looking at it.
        """
        read = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, FakeTensor)}
        written = [View.of(out) if isinstance(out, FakeTensor) else None for out in outputs]
        fresh = tuple(None if view is None or view.storage in self._storages else view for view in written)
        for out in outputs:
            if isinstance(out, FakeTensor):
                self.adopt(out)
        new = {view.storage for view in fresh if view is not None}
        if not mutated and (not new or function in _UNSET):
            return
        forgotten = self._forgotten(leaves) if overwrites else None
        needs = {self._last_writer[key] for key in read if key in self._last_writer and key != forgotten}
        self._entries.append(
            _Entry(
                function=function,
                leaves=tuple(self._written_down(leaf) for leaf in leaves),
                spec=spec,
                outputs=fresh,
                needs=tuple(sorted(needs)),
                touched=frozenset(read | new),
                random_state=random_state,
                default_dtype=torch.get_default_dtype(),
            )
        )
        for key in mutated | new:
            self._last_writer[key] = len(self._entries) - 1

    def _forgotten(self, leaves: Sequence[Any]) -> int | None:
        """The storage of the first argument if it is wholly set anew and not read by another argument."""
        fakes = [View.of(leaf) for leaf in leaves if isinstance(leaf, FakeTensor)]
        key = fakes[0].storage
        if any(view.storage == key for view in fakes[1:]) or not fakes[0].fills(self._storages[key].nbytes()):
            return None
        return key

    def _written_down(self, leaf: Any) -> Any:
        if isinstance(leaf, FakeTensor):
            return View.of(leaf)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        kept = leaf
        if leaf.untyped_storage().nbytes() <= self._small * leaf.element_size():
            # Copied by storage: an expanded tensor stays small.
            kept = torch.empty(0, dtype=leaf.dtype).set_(
                leaf.untyped_storage().clone(),  # type: ignore[no-untyped-call]
                leaf.storage_offset(),
                leaf.size(),
                leaf.stride(),
            )
            kept = kept.conj() if leaf.is_conj() else kept
        return _Constant(kept, kept._version)

    def slice_of(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """Entries that the values of `tensors` follow from, in order."""
        pending = [self._last_writer.get(tensor.untyped_storage()._cdata) for tensor in tensors]
        found: set[int] = set()
        while pending:
            index = pending.pop()
            if index is not None and index not in found:
                found.add(index)
                pending.extend(self._entries[index].needs)
        return sorted(found)

    def is_random(self, tensor: torch.Tensor) -> bool:
        """Whether the generator has a part in the tensor's values."""
        return any(self._entries[index].random_state is not None for index in self.slice_of([tensor]))

    def evaluate(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Real tensors with the values that the fake `tensors` stand for now; the generator is left as it was.

        They may share storage with one another as the fake ones do. What was never set is zero.

        Raises:
            DeferredError: a tensor was not made under this tape, or a large real argument has changed since.
        """
        for tensor in tensors:
            if not self.knows(tensor):
                raise DeferredError(f"a tensor of shape {tuple(tensor.shape)} was not made by this build")
        order = self.slice_of(tensors)
        last_use = {key: index for index in order for key in self._entries[index].touched}
        kept = {tensor.untyped_storage()._cdata for tensor in tensors}
        real: dict[int, torch.UntypedStorage] = {}
        state, dtype = torch.default_generator.get_state(), torch.get_default_dtype()
        with plainly():
            try:
                for index in order:
                    entry = self._entries[index]
                    self._replay(entry, real)
                    for key in entry.touched:
                        if last_use[key] == index and key not in kept:
                            real.pop(key, None)
                return [self._read(View.of(tensor), real) for tensor in tensors]
            finally:
                torch.set_default_dtype(dtype)
                torch.default_generator.set_state(state)

    def _read(self, view: View, real: dict[int, torch.UntypedStorage]) -> torch.Tensor:
        if view.storage not in real:
            nbytes = self._storages[view.storage].nbytes()
            real[view.storage] = torch.zeros(nbytes, dtype=torch.uint8).untyped_storage()
        return view.read(real[view.storage])

    def _replay(self, entry: _Entry, real: dict[int, torch.UntypedStorage]) -> None:
        torch.set_default_dtype(entry.default_dtype)
        leaves = [self._value(leaf, entry, real) for leaf in entry.leaves]
        if entry.random_state is not None:
            torch.default_generator.set_state(entry.random_state)
        args, kwargs = pytree.tree_unflatten(leaves, entry.spec)
        outputs = pytree.tree_leaves(entry.function(*args, **kwargs))
        for view, out in zip(entry.outputs, outputs, strict=True):
            if view is None:
                continue
            if tuple(out.size()) != view.size or out.dtype != view.dtype:
                raise DeferredError(f"{entry.function} gave {tuple(out.size())}, expected {view.size}")
            if tuple(out.stride()) != view.stride or out.storage_offset() != view.offset:
                real[view.storage] = _laid_out(out, view).untyped_storage()
            else:
                real[view.storage] = out.untyped_storage()

    def _value(self, leaf: Any, entry: _Entry, real: dict[int, torch.UntypedStorage]) -> Any:
        if isinstance(leaf, View):
            return self._read(leaf, real)
        if isinstance(leaf, _Constant):
            if leaf.tensor._version != leaf.version:
                raise DeferredError(f"an argument of {entry.function} was changed after its use")
            return leaf.tensor
        return leaf


def _laid_out(tensor: torch.Tensor, view: View) -> torch.Tensor:
    """The same values with the size, stride and offset of `view`."""
    reach = sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=True))
    base = torch.empty(view.offset + reach + 1, dtype=view.dtype)
    return base.as_strided(view.size, view.stride, view.offset).copy_(tensor)


_UNSET = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    }
)
