"""The user's model, built: as it is when it came as a module, without its large values when it came as a function."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from plait.capture.deferred import Deferred, DeferredError, build_deferred
from plait.capture.job import Job
from plait.errors import TargetError

__all__ = ["Built", "build"]


@dataclass
class Built:
    """A model whose tensors are handed out one by one."""

    module: nn.Module
    """Its large parameters may be empty: shapes, dtypes, ties and names are right, values are not to be read."""
    value: Callable[[str], torch.Tensor]
    """Full value of a parameter or buffer by name: that which one device has from the same seed."""

    def changed(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Built:
        """The same model with other initial values of its parameters: change(name, value)."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))

        def value(name: str) -> torch.Tensor:
            return change(name, self.value(name)) if name in parameters else self.value(name)

        return Built(self.module, value)

    def trains(self, name: str) -> bool:
        """Whether a parameter requires a gradient."""
        return self.module.get_parameter(name).requires_grad


def build(job: Job, *, seed: int, values: bool) -> Built:
    """The job's model. `values=False` when only its structure is wanted (capture), which is faster.

    Raises:
        TargetError: the function gives no module, or the module has no parameter.
    """
    built = _as_it_is(job.model) if isinstance(job.model, nn.Module) else _from_function(job.model, seed, values)
    if not any(True for _ in built.module.parameters()):
        raise TargetError("job: the model has no parameters", hint="there is nothing to train")
    return built


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def _as_it_is(module: nn.Module) -> Built:
    named = _tensors(module)
    return Built(module, lambda name: named[name].detach())


def _from_function(function: Callable[[], nn.Module], seed: int, values: bool) -> Built:
    try:
        deferred = build_deferred(function, seed, advance=values)
    except DeferredError:
        # Construction that reads its own large values: built whole, then, as on one device.
        torch.manual_seed(seed)
        module: Any = function()
        if not isinstance(module, nn.Module):
            raise TargetError(f"job: model() gave a {type(module).__name__}, not a torch.nn.Module") from None
        return _as_it_is(module)
    originals = _tensors(deferred.module)
    _put_stand_ins(deferred)
    return Built(deferred.module, lambda name: deferred.materialise(originals[name]))


def _put_stand_ins(deferred: Deferred) -> None:
    """Ordinary CPU tensors without memory in the place of the fake ones, for torch.export.

    They lie in a sparse file: any size, no pages behind it as long as nothing is written.
    """
    module = deferred.module
    named = {name: t for name, t in _tensors(module).items() if deferred.is_deferred(t)}
    starts: dict[int, int] = {}
    total = 0
    for tensor in named.values():
        key = deferred.storage_key(tensor)
        if key not in starts:
            starts[key] = total
            total += -(-tensor.untyped_storage().nbytes() // 64) * 64
    if not total:
        return
    with tempfile.NamedTemporaryFile(prefix="plait-") as file:
        file.truncate(total)
        storage: Any = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=total)
    made: dict[int, torch.Tensor] = {}
    for name, tensor in named.items():
        if id(tensor) not in made:
            offset = starts[deferred.storage_key(tensor)] // tensor.element_size() + tensor.storage_offset()
            stand_in = torch.empty(0, dtype=tensor.dtype).set_(storage, offset, tensor.shape, tensor.stride())
            if isinstance(tensor, nn.Parameter):
                stand_in = nn.Parameter(stand_in, requires_grad=tensor.requires_grad)
            made[id(tensor)] = stand_in
        owner, _, attribute = name.rpartition(".")
        slots = module.get_submodule(owner)
        table: dict[str, Any] = slots._parameters if attribute in slots._parameters else slots._buffers
        table[attribute] = made[id(tensor)]
