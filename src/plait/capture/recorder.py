"""What happens to each operator while a model is built deferred: run on small tensors, recorded on large ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from plait.capture.tape import DeferredError, Tape, View, plainly

__all__ = ["Recorder", "Requests", "torch_aware"]

_aten = torch.ops.aten

_OVERWRITES = frozenset(
    {
        _aten.bernoulli_.float,
        _aten.cauchy_.default,
        _aten.copy_.default,
        _aten.exponential_.default,
        _aten.fill_.Scalar,
        _aten.fill_.Tensor,
        _aten.geometric_.default,
        _aten.log_normal_.default,
        _aten.normal_.default,
        _aten.random_.default,
        _aten.random_.to,
        getattr(_aten.random_, "from"),
        _aten.uniform_.default,
        _aten.zero_.default,
    }
)
"""Operators that set every element of their first argument without looking at it."""

_TRUNCATED_NORMAL = "_no_grad_trunc_normal_"
"""What `torch.nn.init.trunc_normal_` calls."""

_UNKNOWN_VALUE = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.UnsupportedFakeTensorException,
)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every ATen operator passes here: on small real tensors it runs, on large or fake ones it is recorded."""

    def __init__(self, *, threshold: int, advance: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode = FakeTensorMode()
        self.tape = Tape(threshold)
        self._threshold = threshold
        self._advance = advance
        self._scratch = torch.empty(0, dtype=torch.uint8).untyped_storage()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs or {}))
        if func is torch.ops.prim.device.default:
            return leaves[0].fake_device if isinstance(leaves[0], FakeTensor) else func(*leaves)
        if any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return self._on_fake(func, leaves, spec)
        if not _makes_storage(func) or not _lands_on_cpu(leaves):
            return self._really(func, leaves, spec)
        try:
            fake = self._on_shapes(func, leaves, spec)
        except _UNKNOWN_VALUE:
            return self._really(func, leaves, spec)
        if not any(self._is_large(out) for out in pytree.tree_leaves(fake)):
            return self._really(func, leaves, spec)
        return self._recorded(func, leaves, spec, fake)

    def draw(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Record a Python function that fills its first argument, a fake tensor, with random values."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        target: torch.Tensor = leaves[0]
        keys = frozenset({target.untyped_storage()._cdata})
        self._record(function, leaves, spec, [target], keys, random=True, overwrites=True)
        return target

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a fake tensor stands for at this moment."""
        return self.tape.evaluate([tensor])[0]

    def _on_fake(self, func: Any, leaves: list[Any], spec: pytree.TreeSpec) -> Any:
        mutated = _mutated(func, leaves, spec)
        real = [tensor for tensor in mutated if not isinstance(tensor, FakeTensor)]
        if real and len(real) < len(mutated):
            raise DeferredError(f"{func} writes to a large and to a small tensor at once")
        if real:
            return self._really(func, self._evaluated(leaves), spec)
        try:
            fake = self._on_shapes(func, leaves, spec)
        except _UNKNOWN_VALUE:
            if mutated:
                raise DeferredError(f"{func} writes to a large tensor in a way that depends on values") from None
            return self._really(func, self._evaluated(leaves), spec)
        return self._recorded(func, leaves, spec, fake, mutated)

    def _recorded(self, func: Any, leaves: list[Any], spec: Any, fake: Any, mutated: Any = ()) -> Any:
        keys = frozenset(tensor.untyped_storage()._cdata for tensor in mutated)
        random = torch.Tag.nondeterministic_seeded in func.tags
        outputs = pytree.tree_leaves(fake)
        self._record(func, leaves, spec, outputs, keys, random=random, overwrites=func in _OVERWRITES)
        return fake

    def _record(
        self,
        func: Any,
        leaves: list[Any],
        spec: pytree.TreeSpec,
        outputs: list[Any],
        mutated: frozenset[int],
        *,
        random: bool,
        overwrites: bool,
    ) -> None:
        generators = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
        state = None
        if random:
            state = (generators[0] if generators else torch.default_generator).get_state()
            self._draw_once(func, leaves, spec, mutated)
        # A generator of the user's own is replayed through the default one: both are the same algorithm.
        kept = [None if isinstance(leaf, torch.Generator) else leaf for leaf in leaves]
        with plainly():
            self.tape.record(
                func,
                kept,
                spec,
                outputs=outputs,
                mutated=mutated,
                overwrites=overwrites,
                random_state=state,
            )

    def _draw_once(self, func: Any, leaves: list[Any], spec: Any, mutated: frozenset[int]) -> None:
        """Move the generator as the operation would."""
        if not self._advance:
            # One number, so that loops that draw until something fits do end.
            given = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
            with plainly():
                torch.rand(1, generator=given[0] if given else None)
            return
        self._really(func, self._evaluated(leaves, scratch=mutated), spec)

    def _evaluated(self, leaves: list[Any], scratch: frozenset[int] = frozenset()) -> list[Any]:
        """The arguments with real tensors for fake ones; those of storages in `scratch` hold anything."""
        wanted = [
            leaf for leaf in leaves if isinstance(leaf, FakeTensor) and leaf.untyped_storage()._cdata not in scratch
        ]
        values = iter(self.tape.evaluate(wanted))
        found = []
        with plainly():
            for leaf in leaves:
                if not isinstance(leaf, FakeTensor):
                    found.append(leaf)
                elif leaf.untyped_storage()._cdata in scratch:
                    found.append(self._scratch_like(leaf))
                else:
                    found.append(next(values))
        return found

    def _scratch_like(self, fake: torch.Tensor) -> torch.Tensor:
        """A real tensor to write to and forget, in memory used again and again (malloc would scatter it)."""
        nbytes = fake.untyped_storage().nbytes()
        if self._scratch.nbytes() < nbytes:
            self._scratch = torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
        return View.of(fake).read(self._scratch)

    def _really(self, func: Any, leaves: list[Any], spec: pytree.TreeSpec) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        if isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        with plainly():
            return func(*args, **kwargs)

    def _on_shapes(self, func: Any, leaves: list[Any], spec: pytree.TreeSpec) -> Any:
        """The operator on shapes alone; in-place ones give back the fake tensor they were given."""
        with self.fake_mode:
            fakes = [self._shape_of(leaf) for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(fakes, spec)
            return func(*args, **kwargs)

    def _shape_of(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Generator):
            return None
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
            if not _is_ordinary(leaf):
                raise DeferredError(f"a {type(leaf).__name__} on {leaf.device} meets a large tensor")
            fake = torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=leaf.device)
            return fake.conj() if leaf.is_conj() else fake
        return leaf

    def _is_large(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.numel() > self._threshold


class Requests(TorchFunctionMode):
    """Calls from Python that never become an operator, where a fake tensor needs a value or a copy."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else None
        if not isinstance(target, FakeTensor):
            return func(*args, **kwargs)
        if func is torch.Tensor.__deepcopy__:
            return _deepcopy(target, args[1] if len(args) > 1 else kwargs["memo"])
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            value = getattr(self._recorder.values(target), func.__name__)(*args[1:], **kwargs)
            if func is not torch.Tensor.tolist:
                value.flags.writeable = False  # writing to it would not reach the tensor: refuse
            return value
        if func in (torch.Tensor.data_ptr, torch.Tensor.__reduce_ex__):
            raise DeferredError(f"{func.__name__} of a large tensor")
        return func(*args, **kwargs)


@contextmanager
def torch_aware(recorder: Recorder) -> Iterator[None]:
    """Two functions of torch that know better on fake tensors, for the time of a build.

    The truncated normal becomes one operation: its loop of rejections would ask for values in each round. Conversion of
    a module (`module.to(dtype)`) sets `.data`, as it does for ordinary parameters, where torch would swap objects.
    """
    truncated_normal = getattr(nn.init, _TRUNCATED_NORMAL)
    swap_tensors = torch.utils.swap_tensors

    @functools.wraps(truncated_normal)
    def draw(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return recorder.draw(truncated_normal, (tensor, *args), kwargs)
        return cast("torch.Tensor", truncated_normal(tensor, *args, **kwargs))

    @functools.wraps(swap_tensors)
    def swap(first: torch.Tensor, second: torch.Tensor) -> None:
        if isinstance(first, FakeTensor) and isinstance(second, FakeTensor):
            first.data = second
        else:
            swap_tensors(first, second)  # type: ignore[no-untyped-call]

    setattr(nn.init, _TRUNCATED_NORMAL, draw)
    torch.utils.swap_tensors = swap
    try:
        yield
    finally:
        setattr(nn.init, _TRUNCATED_NORMAL, truncated_normal)
        torch.utils.swap_tensors = swap_tensors


def _deepcopy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """copy.deepcopy of a fake tensor: a recorded clone, again a parameter if it was one."""
    if not tensor.is_leaf:
        raise DeferredError("deepcopy of a tensor that has a gradient function")
    if id(tensor) in memo:
        found: torch.Tensor = memo[id(tensor)]
        return found
    with torch.no_grad():
        new = tensor.detach().clone(memory_format=torch.preserve_format)
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    else:
        new.requires_grad_(tensor.requires_grad)
    for name, value in vars(tensor).items():
        if name not in vars(new):
            setattr(new, name, copy.deepcopy(value, memo))
    memo[id(tensor)] = new
    return new


def _is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether it is a plain dense tensor on the CPU or the meta device."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
    return (
        plain and tensor.device.type in ("cpu", "meta") and tensor.layout is torch.strided and not tensor.is_quantized
    )


def _lands_on_cpu(leaves: list[Any]) -> bool:
    """Whether an operator with these arguments gives plain dense CPU tensors."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)] or [tensor.device for tensor in tensors]
    dense = all(leaf is torch.strided for leaf in leaves if isinstance(leaf, torch.layout))
    return dense and all(device.type == "cpu" for device in devices) and all(map(_is_ordinary, tensors))


def _makes_storage(func: Any) -> bool:
    schema = func._schema
    return not schema.is_mutable and any(
        returned.alias_info is None and "Tensor" in str(returned.type) for returned in schema.returns
    )


def _mutated(func: Any, leaves: list[Any], spec: pytree.TreeSpec) -> list[torch.Tensor]:
    """Tensors among the arguments that the operator writes to."""
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    if func is _aten.native_batch_norm.default and args[5]:
        return [running for running in args[3:5] if running is not None]  # the schema does not say so
    if not func._schema.is_mutable:
        return []
    found: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found
