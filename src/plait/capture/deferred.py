"""Building a model without ever holding it whole, and any of its tensors with the values plain construction gives.

    deferred = build_deferred(build, seed=0)         # seconds of time, megabytes of memory
    deferred.module                                  # large parameters and buffers are fake, small ones real
    deferred.materialise(module.embedding.weight)    # real, bit for bit what `torch.manual_seed(0); build()` has

The constructor runs as written. Tensors above a threshold are fake (no memory) and what is done to them is put on a
tape (`tape.py`) with the generator's state; small tensors are computed as usual. So that what follows draws the
same numbers, a random operation on a fake tensor is carried out once on scratch memory and dropped. Where Python
asks for a value (`item`, `bool`, `tolist`, `numpy`, a copy into a small tensor), it is worked out on the spot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from plait.capture.recorder import Recorder, Requests, torch_aware
from plait.capture.tape import DeferredError, Tape
from plait.errors import PlaitError

__all__ = ["Deferred", "DeferredError", "build_deferred"]


@dataclass(frozen=True)
class Deferred:
    """A module whose large tensors have no memory yet."""

    module: nn.Module
    fake_mode: FakeTensorMode
    """The mode that the fake tensors belong to."""
    exact: bool
    """Whether random values are those of plain construction (built with `advance=True`)."""
    _tape: Tape

    def is_deferred(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is fake and can be materialised here."""
        return isinstance(tensor, FakeTensor) and self._tape.knows(tensor)

    def storage_key(self, tensor: torch.Tensor) -> int:
        """A number that tied tensors (same storage) have in common, fake or real."""
        return int(tensor.untyped_storage()._cdata)

    def materialise(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new real tensor, whole, detached, on the CPU, with the values of plain construction.

        `tensor` is a parameter, buffer or any other tensor of the module, as it was when construction ended: what is
        done to a fake tensor later is not seen. Costs the time of the tensor's own initialisation.

        Raises:
            DeferredError: the tensor is not of this module, or its values are random and construction did not follow
                the generator (`advance=False`).
        """
        if not isinstance(tensor, FakeTensor):
            return tensor.detach().clone()
        if not self.exact and self._tape.knows(tensor) and self._tape.is_random(tensor):
            raise DeferredError("random values were not followed (advance=False); build with advance=True")
        real = self._tape.evaluate([tensor])[0]
        whole = real.untyped_storage().nbytes() == real.numel() * real.element_size()
        return real if whole else real.clone(memory_format=torch.preserve_format)


def build_deferred(
    build: Callable[[], nn.Module], seed: int | None, *, advance: bool = True, threshold: int = 16_384
) -> Deferred:
    """What `torch.manual_seed(seed); build()` gives, with tensors of more than `threshold` elements fake.

    With `seed` None the generator goes on from where it is; it ends where plain construction would leave it. With
    `advance=False`, where only shapes matter, nothing large is drawn: much faster, but every random value after
    the first large one differs, those of small real tensors too, and large random ones cannot be materialised.

    Raises:
        DeferredError: construction did not go through with fake tensors; the generator is put back, so that the caller
            can build whole (and meet the user's own error, if there is one).
    """
    state = torch.default_generator.get_state()
    if seed is not None:
        torch.manual_seed(seed)
    recorder = Recorder(threshold=threshold, advance=advance)
    try:
        with torch_aware(recorder), recorder, Requests(recorder):
            module: object = build()
    except PlaitError:
        raise
    except Exception as problem:
        torch.default_generator.set_state(state)
        if isinstance(problem, DeferredError):
            raise
        raise DeferredError(f"{type(problem).__name__}: {problem}") from problem
    if not isinstance(module, nn.Module):  # the function is the user's own
        torch.default_generator.set_state(state)
        raise DeferredError(f"the function gave {type(module).__name__}, not a module")
    return Deferred(module, recorder.fake_mode, advance, recorder.tape)
