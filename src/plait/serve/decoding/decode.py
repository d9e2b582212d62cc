"""A decoder's two further entry points, `prefill` and `decode`, in a subject's folder: derived, proven, with samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from plait.capture.trace import _no_noise
from plait.errors import ServeError
from plait.serve.decoding.cached import Derived, derive
from plait.serve.decoding.captured import Logits, call_of, is_last_alone, program_of
from plait.serve.decoding.causality import looks_ahead
from plait.serve.decoding.positions import is_users, size_of
from plait.serve.entry import write_sample
from plait.serve.runtimes.spelled import spelled
from plait.serve.subject import Entry, Subject, TensorSpec, write_program

__all__ = ["Proof", "add_decoder", "prove", "with_cache"]

PROVEN_TOKENS = 64
LOGITS = 1e-4
"""Largest difference of a logit over the largest logit that rounding explains: attention sums in another order."""


@dataclass(frozen=True)
class Proof:
    """Greedy decoding with the cache beside the model's own full forward over the same tokens."""

    tokens: int
    max_rel: float
    """Largest difference of a logit over the largest logit."""
    first_difference: int | None
    """Position of the first token that differs; None: all are the same."""
    margin: float | None
    """There: by how much the model's own logit of its token is ahead of that of the other; about 0 is a tie."""
    recomputed: tuple[str, ...] = ()
    """Operators that every step computes at all positions of the capacity, since they mix positions and are no attention."""


def add_decoder(
    subject: Subject, module: nn.Module, inputs: Any, *, capacity: int, most: int, random: bool
) -> tuple[Subject, Proof]:
    """The subject with `prefill` and `decode` for up to `capacity` positions and `most` samples, written; and its proof.

    `module` is in eval mode, `inputs` are a sample of what it is served. `random`: samples with moved weights, too.

    Raises:
        ServeError: the model is no decoder of tokens alone, or cannot run position by position; says why.
    """
    derived, proof = with_cache(module, inputs, capacity=capacity, most=most)
    entries = dict(subject.entries)
    for name in ("prefill", "decode"):
        with _told(f"{name} cannot be exported"):
            entries[name] = _entry(subject.folder, name, derived, capacity, most)
        sizes = (2, 1, most) if "batch" in entries[name].dims else (2, 2, 2)
        samples = _inputs_of(name, derived, capacity, sizes)
        entries[name] = _with_samples(
            entries[name], subject.folder, getattr(derived, name), samples, module if random else None
        )
    found = replace(subject, entries=entries)
    found.write()
    return found, proof


def with_cache(module: nn.Module, inputs: Any, *, capacity: int, most: int) -> tuple[Derived, Proof]:
    """Prefill and decode of a module in eval mode, and their proof.

    Raises:
        ServeError: as `add_decoder`.
    """
    call = call_of(module, inputs)
    program, shortest = program_of(module, call, capacity, most)
    with _told("the programs with a cache cannot be made, or do not run"):
        derived = derive(program, capacity, shortest)
        proof = prove(derived, call, capacity)
    if not proof.max_rel <= LOGITS:
        raise _unequal(program, shortest, call, capacity, proof)
    return derived, replace(proof, recomputed=derived.recomputed)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What goes wrong in programs that are derived is a reason to go without a cache, and no reason to stop the export."""
    try:
        yield
    except ServeError:
        raise
    except Exception as problem:
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        user = [line for line in lines if line.startswith('File "') and is_users(line)]
        where = "".join(f"\n\n  {line}" for line in user[-1:])
        raise ServeError(
            f"decode: {what}: {type(problem).__name__}: {(lines or [''])[0][:200]}{where}",
            hint="generate with the exported forward, which recomputes the prefix",
        ) from None


def _unequal(program: Any, shortest: int, call: Logits, capacity: int, proof: Proof) -> ServeError:
    """The error for a model whose cache gives other logits than the model itself, with the cause where it can be told."""
    with torch.no_grad():
        size = call(torch.zeros(2, 2, dtype=torch.int64)).shape[-1]
        tokens = torch.randint(size, (2, capacity), generator=torch.Generator().manual_seed(0))
        ahead = looks_ahead(program, tokens, capacity, shortest)
    why = (
        f"the model's own results at a position change with the positions after it, first those of {ahead}"
        if ahead
        else "something in it besides attention looks at other positions"
    )
    return ServeError(
        f"decode: position by position the model gives other logits than at once (relative difference {proof.max_rel:.2g}, "
        f"the limit is {LOGITS:g}): {why}",
        hint="generate with the exported forward, which recomputes the prefix",
    )


def prove(derived: Derived, call: Logits, capacity: int, *, seed: int = 0) -> Proof:
    """Up to 64 tokens, greedily, by prefill and decode; then the model itself over what was written, once.

    The first token that differs from the model's own choice after the same tokens is where greedy generation would part.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(1, min(PROVEN_TOKENS, capacity - 3))
    start = max(2, min(capacity - count, capacity // 3))
    with torch.no_grad():
        size = call(torch.zeros(2, 2, dtype=torch.int64)).shape[-1]
        tokens = torch.randint(size, (2, start), generator=generator)
        logits, *caches = derived.prefill(tokens)
        given = [logits]
        for position in range(start, start + count - 1):
            tokens = torch.cat([tokens, given[-1].argmax(-1, keepdim=True)], 1)
            logits, *caches = derived.decode(tokens[:, -1:], torch.tensor([position]), *caches)
            given.append(logits)
        if is_last_alone(call):
            own = torch.stack([call(tokens[:, :length])[:, -1] for length in range(start, tokens.shape[1] + 1)], 1)
        else:
            own = call(tokens)[:, start - 1 :]
    return compared(torch.stack(given, 1), own, start)


def compared(given: torch.Tensor, own: torch.Tensor, start: int) -> Proof:
    """Logits [batch, tokens, vocabulary] beside the model's own after the same tokens; the first is at position `start`."""
    difference = float((given - own).abs().max() / own.abs().max().clamp(min=1e-30))
    other = (given.argmax(-1) != own.argmax(-1)).nonzero()
    first = margin = None
    if len(other):
        sample, place = min(other.tolist(), key=lambda at: at[1])
        first = start + place
        row = own[sample, place]
        margin = float(row.max() - row[given[sample, place].argmax()])
    return Proof(own.shape[1], difference, first, margin)


def _entry(folder: Path, name: str, derived: Derived, capacity: int, most: int) -> Entry:
    module = getattr(derived, name)
    sample = _sample(name, derived, 2, min(capacity, 8), capacity)
    open_dims: list[dict[int, int]] = [{0: most, 1: capacity}] if name == "prefill" else [{0: most}, {}]
    if name == "decode":
        open_dims += [{c.shape.index("batch"): most} if "batch" in c.shape else {} for c in derived.caches]
    shapes = tuple({d: Dim.AUTO(max=size) for d, size in dims.items()} or None for dims in open_dims)
    with torch.no_grad():
        with _no_noise():
            program = spelled(torch.export.export(module, tuple(sample), dynamic_shapes=shapes, strict=False))
        logits = module(*sample)[0]
    write_program(program, folder / f"{name}.pt2")
    is_open = _is_open(program)
    first: int | str = "batch" if is_open else 2
    caches = tuple(
        TensorSpec(c.name, _dtype(c.dtype), tuple(first if s == "batch" else s for s in c.shape))
        for c in derived.caches
    )
    tokens = TensorSpec("tokens", "int64", (first, "length" if name == "prefill" else 1))
    position = () if name == "prefill" else (TensorSpec("position", "int64", (1,)),)
    dims: dict[str, tuple[int, int]] = {"batch": (1, most)} if is_open else {}
    dims["length" if name == "prefill" else "capacity"] = (2 if name == "prefill" else capacity, capacity)
    inputs = (tokens, *position, *(() if name == "prefill" else caches))
    outputs = (TensorSpec("logits", _dtype(logits.dtype), (first, int(logits.shape[-1]))), *caches)
    return Entry(name=name, inputs=inputs, outputs=outputs, dims=dims, program=f"{name}.pt2")


def _is_open(program: torch.export.ExportedProgram) -> bool:
    node = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "tokens")
    return not isinstance(size_of(node.meta["val"].shape[0]), int)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sample(name: str, derived: Derived, batch: int, length: int, capacity: int) -> list[torch.Tensor]:
    """Inputs of an entry point: a prompt, or the step after a prompt of that length."""
    generator = torch.Generator().manual_seed(batch * 1009 + length)
    with torch.no_grad():
        size = derived.prefill(torch.zeros(2, 2, dtype=torch.int64))[0].shape[-1]
        tokens = torch.randint(size, (batch, max(2, length)), generator=generator)
        if name == "prefill":
            return [tokens]
        _, *caches = derived.prefill(tokens)
    position = torch.tensor([min(tokens.shape[1], capacity - 1)])
    return [torch.randint(size, (batch, 1), generator=generator), position, *caches]


def _inputs_of(name: str, derived: Derived, capacity: int, sizes: tuple[int, int, int]) -> list[list[torch.Tensor]]:
    """At the exported sizes, at other batches, and far in the cache."""
    first, least, most = sizes
    wanted = [(first, min(capacity, 8)), (least, capacity // 2), (most, max(2, capacity // 3)), (first, capacity - 1)]
    return [_sample(name, derived, batch, length, capacity) for batch, length in dict.fromkeys(wanted)]


def _with_samples(
    entry: Entry, folder: Path, module: nn.Module, samples: Sequence[Any], moved: nn.Module | None
) -> Entry:
    runs = [{"out": lambda tensors: module(*tensors)} for _ in samples]
    if moved is not None:
        from plait.serve.prepare import outputs_moved

        for run, given in zip(runs, outputs_moved(moved, lambda tensors: module(*tensors), samples), strict=True):
            run["perturbed"] = lambda _, given=given: given  # type: ignore[misc]
    found = [
        write_sample(entry, folder, f"{entry.name}-{i}.safetensors", tensors, run)
        for i, (tensors, run) in enumerate(zip(samples, runs, strict=True))
    ]
    return replace(entry, samples=tuple(found))
