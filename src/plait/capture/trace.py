"""A model to its Program: torch.export, cleaned, with tied weights found and gradients' paths marked."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.export import Dim
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from plait.capture import batch as batches
from plait.capture.announce import said_after
from plait.capture.inline import inline_regions
from plait.capture.job import Job
from plait.capture.measure import measure
from plait.capture.prelude import is_mutating
from plait.capture.program import Placeholder, Program
from plait.capture.randomness import fixed_python_randomness, refused_outside_torch
from plait.capture.segments import mark_segments
from plait.capture.work import build_graph
from plait.errors import CaptureError, TargetError

__all__ = ["call_model", "eval_mode", "in_short", "loss_of", "path_name", "tied_names", "trace", "user_line"]

_DROPPED = {
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default",
}


def trace(
    job: Job,
    *,
    module: nn.Module | None = None,
    batch: int | None = None,
    time_limit: float = 300.0,
    say: Callable[[str], None] | None = None,
    train: bool = True,
) -> Program:
    """The job's model captured at a microbatch of `batch` samples (the sample batch's own size if None).

    `module` is the built model where the caller has it already (its large parameters may be empty). The loss is
    captured with the model; where the user's loss cannot be, the outputs are captured and the loss stays eager.
    With `train` False the model is captured in eval mode and never with a loss; its outputs keep their own structure.

    Raises:
        CaptureError: torch.export cannot capture the model, or it took longer than `time_limit` seconds; the message
            names the user's line.
    """
    size = batches.batch_size(job) if batch is None else batch
    if size == 1:
        try:
            return _trace(job, module, 1, time_limit, say, train)
        except CaptureError:
            # Some operators refuse one sample (batch norm) that is one of several over all replicas: a capture with an
            # open batch then serves it.
            program = _trace(job, module, 2, time_limit, say, train)
            if not program.dynamic:
                raise
            program.sizes = (1, program.sizes[1])
            return program
    return _trace(job, module, size, time_limit, say, train)


def _trace(
    job: Job, module: nn.Module | None, size: int, time_limit: float, say: Callable[[str], None] | None, train: bool
) -> Program:
    if module is None:
        from plait.capture.build import build

        module = build(job, seed=0, values=False).module
    sample = batches.resized(job, size)
    with _announced(say, time_limit):
        if train:
            exported, has_loss = _export_any(job, module, sample, size, time_limit)
        else:
            with eval_mode(module):
                exported, has_loss = _export_outputs(job, module, sample, size, time_limit), False
    program = _clean(job, module, exported, has_loss=has_loss, size=size, train=train)
    measure(program)
    mark_segments(program)
    program.graph = build_graph(program)
    return program


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Within, the module is in eval mode; afterwards each of its parts is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class _Outputs(nn.Module):
    """The model alone, with the arguments (inputs, targets) of which it takes the first."""

    def __init__(self, model: nn.Module, plain: bool) -> None:
        super().__init__()
        self.model = model
        self._plain = plain
        self.eval()

    def forward(self, inputs: Any, targets: Any) -> Any:
        """The model's outputs as they are, or as plain pytrees."""
        del targets
        outputs = call_model(self.model, inputs)
        return _plain(outputs) if self._plain else outputs


class _Whole(nn.Module):
    """Model and loss as one module with the arguments (inputs, targets)."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], torch.Tensor] | None, with_loss: bool) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._with_loss = with_loss

    def forward(self, inputs: Any, targets: Any) -> Any:
        """The loss, or the outputs' tensors."""
        outputs = call_model(self.model, inputs)
        return loss_of(outputs, targets, self._loss) if self._with_loss else _plain(outputs)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """model(inputs): a dict as keyword arguments, a tuple or list as positional ones, anything else as the one."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def _plain(outputs: Any) -> Any:
    """Outputs as plain pytrees (Hugging Face's are dicts that pytree may not know)."""
    return dict(outputs) if hasattr(outputs, "to_tuple") else outputs


def loss_of(outputs: Any, targets: Any, loss: Callable[[Any, Any], torch.Tensor] | None) -> torch.Tensor:
    """The scalar loss by the user's function, else the outputs' own `.loss` or scalar.

    Raises:
        TargetError: there is no scalar to train on.
    """
    if loss is not None:
        value: Any = loss(outputs, targets)
    elif isinstance(outputs, torch.Tensor):
        value = outputs
    elif isinstance(outputs, dict) or hasattr(outputs, "loss"):
        value = outputs["loss"] if isinstance(outputs, dict) else outputs.loss
    else:
        value = outputs[0]
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = f"a tensor of {value.dim()} dims" if isinstance(value, torch.Tensor) else type(value).__name__
        raise TargetError(f"job: the loss must be a scalar tensor, got {got}", hint="pass loss= to the Job")
    return value.reshape(())


def _export_any(
    job: Job, module: nn.Module, sample: tuple[Any, Any], size: int, time_limit: float
) -> tuple[torch.export.ExportedProgram, bool]:
    """The first that works: with loss and open batch, with loss and fixed batch, outputs only likewise."""
    first: BaseException | None = None
    for with_loss in (True, False) if job.loss is not None else (True,):
        for dynamic in (True, False) if size > 1 else (False,):
            try:
                whole = _Whole(module, job.loss, with_loss)
                whole.train(module.training)
                return _export(job, whole, sample, dynamic, time_limit), with_loss
            except (TargetError, CaptureError):
                raise
            except _OutOfTimeError:
                raise CaptureError(
                    f"capture: took longer than {time_limit:.0f} s and was stopped",
                    hint="raise the time limit, or run under dp or fsdp only, which needs no capture",
                ) from None
            except Exception as problem:
                first = first or problem
    assert first is not None
    raise _explained(first) from None


def _export_outputs(
    job: Job, module: nn.Module, sample: tuple[Any, Any], size: int, time_limit: float
) -> torch.export.ExportedProgram:
    """The first that works: the outputs as they are or as plain pytrees, with open batch or with fixed batch."""
    first: BaseException | None = None
    for dynamic in (True, False) if size > 1 else (False,):
        for plain in (False, True):
            try:
                return _export(job, _Outputs(module, plain), sample, dynamic, time_limit)
            except (TargetError, CaptureError):
                raise
            except _OutOfTimeError:
                raise CaptureError(f"capture: took longer than {time_limit:.0f} s and was stopped") from None
            except Exception as problem:
                first = first or problem
    assert first is not None
    raise _explained(first) from None


def _export(
    job: Job, whole: nn.Module, sample: tuple[Any, Any], dynamic: bool, time_limit: float
) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic:
        leaves, spec = pytree.tree_flatten(sample)
        dims = batches.dims_of(job)
        open_dims = [{dim: Dim.AUTO} if dim is not None else None for _, dim in zip(leaves, dims, strict=True)]
        inputs, targets = pytree.tree_unflatten(open_dims, spec)
        shapes = {"inputs": inputs, "targets": targets}
    with _no_noise(), _alarm(time_limit), _masks_unread(), refused_outside_torch(), fixed_python_randomness() as check:
        exported = torch.export.export(whole, sample, dynamic_shapes=shapes, strict=False)
    if check.seen:
        # A scalar random number steered Python. Captured again with it at its other extreme, the graph must be equal.
        with _no_noise(), _alarm(time_limit), _masks_unread(), fixed_python_randomness(high=True):
            other = torch.export.export(whole, sample, dynamic_shapes=shapes, strict=False)
        if [n.target for n in other.graph.nodes] != [n.target for n in exported.graph.nodes]:
            raise CaptureError(
                "capture: a random number decides which layers run (layer drop)",
                hint="set the model's layer drop to 0; dropout and drop path inside tensors are fine",
            )
    return exported


@contextmanager
def _no_noise() -> Iterator[None]:
    """torch.export logs whole graphs when it fails; the one line that matters is in the error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        sink = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _masks_unread() -> Iterator[None]:
    """nn.Transformer compares a mask's values with a causal one, only to choose a faster kernel; capture cannot.

    Without the comparison the mask is applied as it is, which gives the same result.
    """
    with mock.patch.object(
        transformer, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: is_causal is True
    ):
        yield


class _OutOfTimeError(Exception):
    pass


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not seconds:
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _announced(say: Callable[[str], None] | None, limit: float) -> Iterator[None]:
    """Says what is going on when the capture takes longer than a few seconds, and how long it took."""
    if say is None:
        yield
        return
    begin = time.monotonic()
    try:
        with said_after(3.0, say, f"capturing the model with torch.export (limit {limit:.0f} s) ..."):
            yield
    finally:
        if time.monotonic() - begin > 3.0:
            say(f"captured in {time.monotonic() - begin:.1f} s")


def user_line(problem: BaseException) -> str:
    """`file:line: code` of the last frame of the traceback outside torch and plait, '' if there is none."""
    where = ""
    for frame in traceback.extract_tb(problem.__traceback__):
        path = frame.filename.replace("\\", "/")
        if "/torch/" not in path and "/plait/" not in path and not path.startswith("<"):
            where = f"{frame.filename}:{frame.lineno}: {frame.line}"
    return where


def in_short(problem: BaseException, *around: BaseException) -> str:
    """`TypeError at file:line: code (its first line)`; the place is the first that `user_line` finds, of it or of the errors around."""
    where = next(filter(None, map(user_line, (problem, *around))), "")
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}{f' at {where}' if where else ''} ({text[0][:200] if text else 'no message'})"


def _explained(problem: BaseException) -> CaptureError:
    """The error with the user's own line."""
    where = user_line(problem)
    user_code = [line.strip() for line in str(problem).splitlines() if line.strip().startswith('File "')]
    if not where and user_code:
        where = user_code[-1]
    text = str(problem).strip().splitlines()
    reason = text[0][:200] if text else type(problem).__name__
    return CaptureError(
        f"capture: stopped at {where or 'the model'} ({reason})",
        hint="replace control flow that depends on tensor values (torch.where, torch.cond), or run under dp or fsdp "
        "only, which needs no capture",
    )


def _clean(
    job: Job, module: nn.Module, exported: torch.export.ExportedProgram, *, has_loss: bool, size: int, train: bool
) -> Program:
    graph_module = copy.deepcopy(exported.graph_module)
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) in _DROPPED:
            graph.erase_node(node)
    inline_regions(graph_module)
    placeholders, constants = _placeholders(job, module, exported, graph, size)
    sizes = _accepted_sizes(job, exported, placeholders, graph, size)
    aliases = _merge_tied(module, graph, placeholders)
    fixed = _normalise_output(graph)
    graph.eliminate_dead_code(is_impure_node=_is_impure)
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users and placeholders[node.name].kind != "input":
            placeholders.pop(node.name)
            graph.erase_node(node)
    clean = fx.GraphModule(graph_module, graph)
    return Program(
        job=job,
        module=clean,
        placeholders={n.name: placeholders[n.name] for n in clean.graph.nodes if n.op == "placeholder"},
        has_loss=has_loss,
        sizes=sizes,
        batch=size,
        aliases=aliases,
        constants=constants,
        outputs_spec=None if has_loss else exported.module_call_graph[0].signature.out_spec,
        fixed_outputs=fixed,
        train=train,
    )


def _is_impure(node: fx.Node) -> bool:
    """Keep what has an effect: placeholders, outputs, and operators that write into a tensor."""
    return node.op in ("placeholder", "output") or is_mutating(node)


def _strip(name: str) -> str:
    return name.removeprefix("model.")


def _placeholders(
    job: Job, module: nn.Module, exported: torch.export.ExportedProgram, graph: fx.Graph, size: int
) -> tuple[dict[str, Placeholder], dict[str, torch.Tensor]]:
    signature = exported.graph_signature
    parameters = dict(module.named_parameters(remove_duplicate=False))
    inputs = [path_name(path) for path, _ in pytree.tree_flatten_with_path(job.batch)[0]]
    user_inputs = iter(inputs)
    found: dict[str, Placeholder] = {}
    constants: dict[str, torch.Tensor] = {}
    by_node = {spec.arg.name: spec for spec in signature.input_specs}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        spec = by_node[node.name]
        kind = spec.kind.name
        if kind == "PARAMETER":
            name = _strip(spec.target or "")
            found[node.name] = Placeholder("parameter", name, parameters[name].requires_grad)
        elif kind == "BUFFER":
            found[node.name] = Placeholder("buffer", _strip(spec.target or ""))
        elif kind == "CONSTANT_TENSOR":
            # Another capture may have another constant under the same name.
            name = f"{spec.target} at {size} samples"
            found[node.name] = Placeholder("constant", name)
            constants[name] = exported.constants[spec.target or ""].detach()
        elif kind == "USER_INPUT":
            found[node.name] = Placeholder("input", next(user_inputs))
        else:
            raise CaptureError(f"capture: the graph takes a {kind.lower()} ({spec.target}), which plait cannot run")
    return found, constants


def _accepted_sizes(
    job: Job,
    exported: torch.export.ExportedProgram,
    placeholders: dict[str, Placeholder],
    graph: fx.Graph,
    size: int,
) -> tuple[int, int]:
    """The least and the most samples the capture holds for: its own size only where export fixed a batch dimension.

    A size of one is special to torch (broadcasting, strides), so that a capture at two or more says nothing of it.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder" and placeholders[n.name].kind == "input"]
    low, high = 2, sys.maxsize
    for node, dim in zip(inputs, batches.dims_of(job), strict=True):
        if dim is None:
            continue
        length = node.meta["val"].shape[dim]
        if not isinstance(length, torch.SymInt) or not length.node.expr.is_Symbol:
            return size, size
        allowed = exported.range_constraints.get(length.node.expr)
        if allowed is not None:
            low = max(low, int(allowed.lower))
            high = min(high, int(allowed.upper) if allowed.upper < sys.maxsize else high)
    return low, high


def path_name(path: Any) -> str:
    """`inputs.input_ids`, `inputs.0`, `targets`."""
    head = "inputs" if path[0].idx == 0 else "targets"
    rest = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path[1:]]
    return ".".join([head, *rest])


def tied_names(module: nn.Module) -> dict[str, str]:
    """Every further name of a parameter or buffer to the first one; the same storage seen the same way is the same."""
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        key: Any = id(tensor)
        if tensor.numel() and tensor.layout is torch.strided:
            key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return aliases


def _merge_tied(module: nn.Module, graph: fx.Graph, placeholders: dict[str, Placeholder]) -> dict[str, str]:
    """One placeholder per stored tensor, under its first name. Returns the other names."""
    aliases = tied_names(module)
    by_name = {spec.name: node for node, spec in placeholders.items() if spec.kind in ("parameter", "buffer")}
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for other, first in aliases.items():
        if other not in by_name or first not in by_name:
            continue
        nodes[by_name[other]].replace_all_uses_with(nodes[by_name[first]])
        graph.erase_node(nodes[by_name[other]])
        del placeholders[by_name[other]]
    for node, spec in placeholders.items():
        if spec.name in aliases:
            placeholders[node] = Placeholder(spec.kind, aliases[spec.name], spec.trainable)
    return aliases


def _normalise_output(graph: fx.Graph) -> dict[int, Any]:
    """Make the output a tuple of tensors; returns what else the outputs hold, by position among their leaves."""
    output = graph.output_node()
    leaves = pytree.tree_leaves(output.args[0])
    with graph.inserting_before(output):
        output.args = (tuple(_made_in_graph(graph, v) for v in leaves if isinstance(v, fx.Node)),)
    return {i: v for i, v in enumerate(leaves) if not isinstance(v, fx.Node)}


def _made_in_graph(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The node; a copy of it where it is an argument that is given back as it came."""
    if node.op != "placeholder":
        return node
    copied = graph.call_function(torch.ops.aten.clone.default, (node,))
    copied.meta = dict(node.meta)
    return copied
