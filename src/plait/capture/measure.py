"""What autograd would keep: the captured graph run once on fake tensors, at the captured size.

Sets on every node `meta["requires_grad"]`, `meta["saved_bytes"]` (bytes kept for the backward that no earlier node
keeps; parameters, buffers and inputs not counted), `meta["specs"]` (name, concrete shape and dtype of its tensors) and
`meta["storages"]` (numbers that views of the same memory have in common).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from plait.capture.prelude import is_mutating, preludes
from plait.capture.program import Program
from plait.schema import TensorSpec

__all__ = ["concrete", "measure"]


def concrete(value: Any) -> Any:
    """A symbolic size as the number it had at capture."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint
    return value


def measure(program: Program) -> None:
    """Run the graph on fake tensors with autograd on, and write down what it shows."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    run = _Measuring(program.module, preludes(program))
    arguments = []
    leaves: dict[int, str] = {}
    for node in program.module.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                with mode:
                    shape = [concrete(n) for n in value.shape]
                    value = torch.empty(shape, dtype=value.dtype, device=value.device)
                value.requires_grad_(program.placeholders[node.name].trainable)
                leaves[id(value)] = node.name
                run.kept.add(value.untyped_storage()._cdata)
                run.alive.append(value)
            arguments.append(concrete(value))
    with mode, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(run.pack, lambda tensor: tensor):
        outputs = run.run(*arguments)
    reached = {leaves[id(leaf)] for leaf in _reached(outputs) if id(leaf) in leaves}
    for name, place in program.placeholders.items():
        if place.trainable and name not in reached:
            # The loss does not depend on it: one device gives it no gradient and its optimizer passes it over.
            program.placeholders[name] = replace(place, reached=False)


def _reached(outputs: Any) -> list[torch.Tensor]:
    """The leaves that a backward from the outputs would give a gradient."""
    stack = [t.grad_fn for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    seen: set[Any] = set()
    found = []
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        leaf = getattr(function, "variable", None)
        if leaf is not None:
            found.append(leaf)
        stack += [following for following, _ in function.next_functions]
    return found


class _Measuring(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, uncounted: set[fx.Node]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._uncounted = uncounted
        self.kept: set[int] = set()
        self.alive: list[torch.Tensor] = []
        self._saved = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts the bytes of a saved tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.kept:
            self.kept.add(storage._cdata)
            self.alive.append(tensor)
            size: Any = storage.nbytes()
            self._saved += size if isinstance(size, int) else 0
        return tensor

    def run_node(self, n: fx.Node) -> Any:
        self._saved = 0
        result = super().run_node(n)
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        if n in self._uncounted:
            self.kept |= {t.untyped_storage()._cdata for t in tensors}
        n.meta["requires_grad"] = any(t.requires_grad for t in tensors)
        n.meta["saved_bytes"] = self._saved
        n.meta["storages"] = frozenset(t.untyped_storage()._cdata for t in tensors)
        n.meta["specs"] = tuple(
            TensorSpec(
                name=n.name if len(tensors) == 1 else f"{n.name}.{i}",
                shape=tuple(int(concrete(size) or 0) for size in t.shape),
                dtype=str(t.dtype).removeprefix("torch."),
            )
            for i, t in enumerate(tensors)
        )
        if is_mutating(n):
            self._mark_written()
        return result

    def _mark_written(self) -> None:
        """A tensor that was written into may have come to need a gradient: look again at every value so far."""
        for node, value in self.env.items():
            if not node.meta.get("requires_grad") and isinstance(value, torch.Tensor) and value.requires_grad:
                node.meta["requires_grad"] = True
