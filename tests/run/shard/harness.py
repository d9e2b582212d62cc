"""Run lowered graphs on small gloo groups whose processes stay, and compare them with one device.

A case is the name of a function in `models.py` (or `hf:TYPE`) that builds (model, inputs); inputs are keyword
arguments, the model's output is its loss or has one.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import queue
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from plait.capture.job import Job
from plait.capture.program import Placeholder
from plait.capture.trace import trace
from plait.run.shard import Decisions, decide, lower

HERE = Path(__file__).parent


@dataclass
class Outcome:
    """What one case gave on one rank."""

    case: str
    loss_error: float = float("nan")
    gradient_error: float = float("nan")
    worst: str = ""
    disagree: list[str] = field(default_factory=list)
    """Whole parameters whose gradients are not bit-identical on all ranks."""
    forward: dict[str, int] = field(default_factory=dict)
    """Collectives counted in the forward, by kind."""
    backward: dict[str, int] = field(default_factory=dict)
    sharded: float = 0.0
    """Fraction of parameter elements that are stored as slices."""
    whole: list[str] = field(default_factory=list)
    decide_seconds: float = 0.0
    problem: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether losses and gradients are one device's."""
        return not self.problem and self.loss_error < 1e-5 and self.gradient_error < 1e-5 and not self.disagree


class WithLoss(nn.Module):
    """A model as a function of its inputs that returns the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> torch.Tensor:
        outputs = self.model(**inputs)
        if isinstance(outputs, torch.Tensor):
            return outputs
        return outputs.loss if getattr(outputs, "loss", None) is not None else some_loss(outputs)


def some_loss(outputs: Any) -> torch.Tensor:
    """A scalar that depends on all floating outputs."""
    found = torch.utils._pytree.tree_leaves(outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs)
    total = torch.zeros(())
    for index, each in enumerate(t for t in found if isinstance(t, torch.Tensor) and t.is_floating_point()):
        total = total + (each.float() * torch.linspace(0.5, 1.5, each.shape[-1])).pow(2).mean() * (index + 1)
    return total


def capture(
    model: nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[fx.GraphModule, dict[str, Placeholder], dict[str, torch.Tensor]]:
    """The flat training-level graph, its placeholders and their values."""
    whole = WithLoss(model)
    program = trace(Job(whole, batch=(inputs, None)))
    state = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    given: dict[str, Any] = {"targets": None, **{f"inputs.{k}": v for k, v in inputs.items()}}
    values = {}
    for name, place in program.placeholders.items():
        source = {"input": given, "constant": program.constants}.get(place.kind, state)
        values[name] = source[place.name]
    return program.module, program.placeholders, values


def reference(
    model: nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss, gradients and buffers after one step of the unmodified model."""
    model = WithLoss(copy.deepcopy(model))
    loss = model(**inputs)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    return loss.detach(), gradients, {n: b.clone() for n, b in model.named_buffers(remove_duplicate=False)}


class Counter:
    """Counts collectives."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._saved = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def __enter__(self) -> Self:
        for name, function in self._saved.items():
            setattr(dist, name, self._wrap(name, function))
        return self

    def _wrap(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return counted

    def __exit__(self, *_: object) -> None:
        for name, function in self._saved.items():
            setattr(dist, name, function)

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        counts, self.counts = self.counts, {}
        return counts


def build(case: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model and inputs of a case."""
    torch.manual_seed(0)
    models = importlib.import_module("models")
    kind, _, name = case.partition(":")
    model, inputs = models.huggingface(name) if kind == "hf" else getattr(models, case)()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.train(), inputs


def run_case(case: str, rank: int, tp: int, group: dist.ProcessGroup) -> Outcome:
    """One case on one rank."""
    outcome = Outcome(case)
    model, inputs = build(case)
    loss, gradients, buffers = reference(model, inputs)
    module, placeholders, values = capture(model, inputs)
    start = time.perf_counter()
    decisions = decide(module, placeholders, tp)
    outcome.decide_seconds = time.perf_counter() - start
    outcome.whole = [f"{w.parameter}: {w.reason}" for w in decisions.whole]
    local, layouts = lower(module, decisions, placeholders, tp, rank, group)
    feeds: dict[str, torch.Tensor] = {}
    leaves: dict[int, torch.Tensor] = {}
    for name, place in placeholders.items():
        value = values[name]
        if place.kind == "input":
            feeds[name] = value
            continue
        if id(value) not in leaves:
            leaves[id(value)] = layouts[name].take(value.detach())
            leaves[id(value)].requires_grad_(place.trainable)
        feeds[name] = leaves[id(value)]
    parameters = {n: v for n, v in feeds.items() if placeholders[n].kind == "parameter"}
    total = sum(v.numel() for v in {id(v): v for n, v in values.items() if n in parameters}.values())
    stored = sum(values[n].numel() for n in {id(values[n]): n for n in parameters if n in decisions.stored}.values())
    outcome.sharded = stored / max(total, 1)
    with Counter() as counter:
        (found, *_) = torch.utils._pytree.tree_leaves(local(*feeds.values()))
        outcome.forward = counter.take()
        if found.requires_grad:
            found.backward()
        outcome.backward = counter.take()
    outcome.loss_error = float((found.detach() - loss).abs() / loss.abs().clamp(min=1e-12))
    compare(outcome, decisions, placeholders, feeds, layouts, gradients, group)
    for name, place in placeholders.items():
        if place.kind == "buffer" and place.name in buffers and feeds[name].is_floating_point():
            want = layouts[name].take(buffers[place.name])
            if not torch.allclose(want, feeds[name], rtol=1e-4, atol=1e-5):
                outcome.problem = f"buffer {place.name} differs"
    return outcome


@dataclass
class Noise:
    """What random operators did on one rank."""

    sharded: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of two runs from the same seed."""
    recomputed: float = float("nan")
    """Largest difference of gradients between a run with and one without activation recomputation."""
    next_number: float = float("nan")
    problem: str = ""


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


def run_noise(case: str, rank: int, tp: int, group: dist.ProcessGroup) -> Noise:
    """Masks and repeatability of a model with dropout."""
    model, inputs = build(case)
    module, placeholders, values = capture(model, inputs)
    local, layouts = lower(module, decide(module, placeholders, tp), placeholders, tp, rank, group)
    feeds = []
    for name, place in placeholders.items():
        value = values[name] if place.kind == "input" else layouts[name].take(values[name].detach())
        feeds.append(value if place.kind == "input" else value.requires_grad_(place.trainable))
    leaves = [f for f in feeds if isinstance(f, torch.Tensor) and f.requires_grad]

    def gradients(recompute: bool) -> tuple[float, list[torch.Tensor]]:
        torch.manual_seed(5)
        if recompute:
            (loss,) = torch.utils._pytree.tree_leaves(checkpoint(local, *feeds, use_reentrant=False))
        else:
            (loss,) = torch.utils._pytree.tree_leaves(local(*feeds))
        return float(loss), list(torch.autograd.grad(loss, leaves))

    noise = Noise()
    first, once = gradients(recompute=False)
    second, again = gradients(recompute=True)
    noise.losses = [first, second]
    noise.recomputed = max(float((a - b).abs().max()) for a, b in zip(once, again, strict=True))
    torch.manual_seed(5)
    recorder = _Recorder(local)
    recorder.run(*feeds)
    noise.next_number = float(torch.rand(()))
    noise.sharded = recorder.seen["dropout"].flatten().tolist()
    noise.whole = recorder.seen["dropout_1"].flatten().tolist()
    return noise


def compare(
    outcome: Outcome,
    decisions: Decisions,
    placeholders: dict[str, Placeholder],
    feeds: dict[str, torch.Tensor],
    layouts: dict[str, Any],
    gradients: dict[str, torch.Tensor],
    group: dist.ProcessGroup,
) -> None:
    """Every gradient against the reference's share, and whole ones bit for bit between ranks."""
    norm = max((float(g.norm()) for g in gradients.values()), default=1.0)
    outcome.gradient_error = 0.0
    for name, place in placeholders.items():
        if place.kind != "parameter" or not place.trainable:
            continue
        have, want = feeds[name].grad, gradients.get(place.name)
        if want is None:
            if have is not None and float(have.abs().max()) > 0:
                outcome.problem = f"{place.name} has a gradient, the reference none"
            continue
        share = layouts[name].take(want)
        have = torch.zeros_like(share) if have is None else have
        # The floor is for gradients that are zero in exact arithmetic.
        error = float((have - share).norm() / max(float(share.norm()), 1e-6 * norm, 1e-12))
        if share.norm() < 1e-6 * norm and float((have - share).norm()) < 1e-6 * norm:
            error = 0.0
        if error > outcome.gradient_error or math.isnan(error):
            outcome.gradient_error, outcome.worst = error, place.name
        if name not in decisions.stored:
            others = [torch.empty_like(have) for _ in range(decisions.tp)]
            dist.all_gather(others, have.contiguous(), group=group)
            if any(not torch.equal(o, have) for o in others):
                outcome.disagree.append(place.name)


def _work(rank: int, tp: int, address: str, asks: Any, answers: Any) -> None:
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=tp)
    while (case := asks.get()) is not None:
        group = dist.group.WORLD
        assert group is not None
        function, case = case
        try:
            outcome = globals()[function](case, rank, tp, group)
        except Exception:
            outcome = Outcome(str(case), problem=traceback.format_exc())
        answers.put((rank, outcome))
    dist.destroy_process_group()


class Workers:
    """A group of processes that run one case after the other."""

    def __init__(self, tp: int) -> None:
        self.tp = tp
        self._known: dict[tuple[str, Any], list[Any]] = {}
        context = mp.get_context("spawn")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        address = f"file://{tempfile.mkdtemp(prefix='plait-shard-')}/store"
        self.asks = [context.Queue() for _ in range(tp)]
        self.answers = context.Queue()
        self.processes = [
            context.Process(target=_work, args=(r, tp, address, self.asks[r], self.answers), daemon=True)
            for r in range(tp)
        ]
        for process in self.processes:
            process.start()

    def run(self, case: Any, function: str = "run_case", timeout: float = 180) -> list[Outcome]:
        """The outcomes of all ranks.

        Raises:
            TimeoutError: a rank has not answered in time; the workers are gone then.
        """
        if (function, case) in self._known:
            return self._known[function, case]
        for ask in self.asks:
            ask.put((function, case))
        found: dict[int, Outcome] = {}
        end = time.monotonic() + timeout
        while len(found) < self.tp:
            try:
                rank, outcome = self.answers.get(timeout=max(0.1, min(end - time.monotonic(), 1)))
                found[rank] = outcome
            except queue.Empty:
                failed = any(getattr(o, "problem", "") for o in found.values())
                if time.monotonic() > end or (failed and time.monotonic() > end - timeout + 30 and found):
                    self.close(hard=True)
                    detail = next((o.problem for o in found.values() if getattr(o, "problem", "")), "no answer")
                    raise TimeoutError(f"{case}: {detail}") from None
        self._known[function, case] = [found[r] for r in range(self.tp)]
        return self._known[function, case]

    def close(self, hard: bool = False) -> None:
        """End the processes."""
        for ask, process in zip(self.asks, self.processes, strict=True):
            if hard:
                process.kill()
            else:
                ask.put(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
