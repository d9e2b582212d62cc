"""Random weights moved, so that a check of parity can fail.

Freshly made networks hide mistakes: zero biases and zero last scales of residual blocks let an exporter drop half of the
network and still agree with eager. Seen with a ResNet: a file of 2.8 MB for 46.8 MB of weights, error 2.7e-7.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["perturb"]

_STEP = (
    0.02  # moved biases by as much as fresh weights of a transformer are wide; outputs stay finite in all ten models
)


def perturb(state: Mapping[str, torch.Tensor]) -> None:
    """Add normal noise of width 0.02 to every floating-point tensor in place, the same for the same names.

    What is all positive (variances of batch norms have to be) gets its absolute value.
    """
    import torch

    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in sorted(state.items()):
            if not tensor.is_floating_point() or tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) * _STEP
            positive = bool((tensor > 0).all())
            tensor.add_((noise.abs() if positive else noise).to(tensor.dtype))
