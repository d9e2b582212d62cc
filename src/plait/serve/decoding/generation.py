"""A backend's greedy generation beside eager's, in a child process: the same tokens, and how many a second.

Eager is the user's own module: by its `generate` with its cache where it has one (transformers' models), otherwise by
recomputing the prefix for every token, which is all that a plain module offers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from plait.serve.backend import Artefact, Backend, Runner
from plait.serve.baseline import eager
from plait.serve.decoding.generate import all_inputs, capacity_of, greedy, logits_of, roles_of
from plait.serve.subject import Subject

__all__ = ["generation"]

_Logits = Callable[[Any], Any]

TOKENS = 64
_ROUNDS = 3
_SLOW = 10.0  # seconds of both generations, from which one round has to do


def generation(
    backend: Backend,
    subject: Subject,
    folder: Any,
    facts: Mapping[str, Any],
    precision: str,
    threads: int,
    *,
    timed: bool,
) -> dict[str, Any]:
    """Whether the tokens are eager's, the first position where they part and eager's margin there; tokens a second of both.

    A margin near 0 is a tie, which rounding decides.
    """
    import torch

    torch.set_num_threads(threads)
    entries = {name: subject.entries[name] for name in ("prefill", "decode")}
    runs: dict[str, Runner] = {
        name: backend.load(
            Artefact(folder=folder, entry=entry, precision=precision, threads=threads, facts=facts, subject=subject)
        )
        for name, entry in entries.items()
    }
    room = capacity_of(entries["decode"])
    prompt = subject.inputs(entries["prefill"].samples[0], "prefill")[0]
    if "batch" in entries["decode"].dims:
        prompt = prompt[:1]
    count = min(TOKENS, room + 1 - prompt.shape[1])
    forward, module, which = eager(subject)
    own_entry = subject.entries["forward"]
    place = (logits_of(own_entry) or logits_of(own_entry, 2))[0]
    dtypes = [getattr(torch, spec.dtype) for spec in own_entry.inputs]
    roles = roles_of(subject.inputs(own_entry.samples[0])) or ["tokens"]

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        found = forward(all_inputs(roles, dtypes, tokens))[place]
        return found if found.dim() == 3 else found[:, None]

    if which == "exported" and own_entry.dims.get("length", (1, 0))[1] < room:
        # The forward ends at the sample's length; prefill is the same graph up to the cache's.
        prefill = subject.program("prefill").module(check_guards=False)

        def logits(tokens: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                last: torch.Tensor = prefill(tokens)[0]
            return last[:, None]

    own = _own_generate(module, logits)
    limits = facts.get("serves")

    def ours(new: int) -> torch.Tensor:
        return greedy(runs, entries, prompt, new, limits=limits)

    begin = time.perf_counter()
    got, expected = ours(count), own(prompt, count)
    rounds = _ROUNDS if time.perf_counter() - begin < _SLOW else 1
    found: dict[str, Any] = {
        "tokens": count,
        "prompt": prompt.shape[1],
        "threads": threads,
        "baseline": f"{which}, {'its own cache' if hasattr(module, 'generate') else 'prefix recomputed'}",
        "equal": bool(torch.equal(got, expected)),
        **_parted(got, expected, prompt.shape[1], logits),
    }
    if timed:
        calls = {"ours": ours, "own": lambda new: own(prompt, new)}
        found["backend"], found["eager"] = _rates(calls, prompt, count, rounds)
    return found


def _own_generate(module: Any, logits: _Logits) -> Callable[[Any, int], Any]:
    import torch

    if hasattr(module, "generate") and hasattr(module, "generation_config"):

        def by_cache(prompt: torch.Tensor, count: int) -> torch.Tensor:
            with torch.no_grad():
                options = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
                mask = torch.ones_like(prompt)
                return module.generate(prompt, attention_mask=mask, max_new_tokens=count, **options)  # type: ignore[no-any-return]

        return by_cache

    def by_prefix(prompt: torch.Tensor, count: int) -> torch.Tensor:
        tokens = prompt
        for _ in range(count):
            tokens = torch.cat([tokens, logits(tokens)[:, -1:].argmax(-1)], 1)
        return tokens

    return by_prefix


def _parted(got: Any, expected: Any, start: int, logits: _Logits) -> dict[str, Any]:
    other = (got != expected).nonzero()
    if not len(other):
        return {"first_difference": None, "margin": None}
    sample, place = min(other.tolist(), key=lambda at: at[1])
    row = logits(expected[:, :place])[sample, -1]
    return {"first_difference": place - start, "margin": float(row.max() - row[got[sample, place]])}


def _rates(calls: Mapping[str, Callable[[int], Any]], prompt: Any, count: int, rounds: int) -> list[dict[str, float]]:
    """Medians of rounds taken in turn: one token is a prefill, the further ones are decode steps."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds = []
            for new in (1, count):
                begin = time.perf_counter()
                call(new)
                seconds.append(time.perf_counter() - begin)
            times[name].append((seconds[0], seconds[1]))
    found = []
    for taken in times.values():
        first = sorted(one for one, _ in taken)[rounds // 2]
        rest = sorted(max(1e-9, all_ - one) for one, all_ in taken)[rounds // 2]
        found.append({"prefill_tokens_per_s": prompt.numel() / first, "decode_tokens_per_s": (count - 1) / rest})
    return found
