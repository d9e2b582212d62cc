"""Greedy generation with a loaded artefact: prefill once, then one token a call with the cache.

    served = plait.serve.load("exports/gpt/onnxruntime")
    tokens = served.generate(prompt, max_new_tokens=64)

An artefact without a cache (exported without --max-length) recomputes the prefix for every token by `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from plait.errors import ServeError

if TYPE_CHECKING:
    import torch

    from plait.serve.served import Served
    from plait.serve.subject import Entry

__all__ = ["all_inputs", "capacity_of", "generate", "greedy", "logits_of", "roles_of"]


def generate(served: Served, tokens: Any, *, max_new_tokens: int = 64, stop: int | None = None) -> torch.Tensor:
    """`tokens` [batch, length] and the most likely ones after them, [batch, length + new].

    `stop`: a token after which a sample is done; the rest of its row is that token, and all end when every row has it.

    Raises:
        ServeError: no token was given, there is no room for so many, or the artefact is no decoder.
    """
    import torch

    if not isinstance(tokens, torch.Tensor):
        tokens = torch.as_tensor(tokens)
    if tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
        raise ServeError(f"{served.folder}: a prompt is whole numbers [batch, length], got {list(tokens.shape)}")
    if max_new_tokens < 1:
        raise ServeError(f"{served.folder}: max_new_tokens={max_new_tokens} must be at least 1")
    entries = served.manifest.entries
    if "decode" not in entries:
        return _by_forward(served, tokens, max_new_tokens, stop)
    functions = {name: _positional(served.entry(name)) for name in ("prefill", "decode")}
    return greedy(functions, entries, tokens.long(), max_new_tokens, stop=stop, where=str(served.folder))


def _positional(function: Any) -> Callable[[Sequence[Any]], Sequence[Any]]:
    def run(inputs: Sequence[Any]) -> Sequence[Any]:
        outputs = function(*inputs)
        return list(outputs.values()) if isinstance(outputs, dict) else [outputs]

    return run


def greedy(
    run: Mapping[str, Callable[[Sequence[Any]], Sequence[Any]]],
    entries: Mapping[str, Entry],
    tokens: torch.Tensor,
    count: int,
    *,
    stop: int | None = None,
    where: str = "decode",
    limits: Mapping[str, Sequence[int]] | None = None,
) -> torch.Tensor:
    """The loop, over the functions of the two entry points. `limits`: what the artefact serves less than its entries say.

    A prompt that prefill does not take (a single token, or where the backend has a fixed length) goes through decode.

    Raises:
        ServeError: prompt and new tokens need more positions than the cache has.
    """
    import torch

    have, room = tokens.shape[1], capacity_of(entries["decode"])
    if have + count - 1 > room:
        raise ServeError(
            f"{where}: {have} tokens and {count} new ones need {have + count - 1} positions, the cache has {room}",
            hint=f"export with --max-length {have + count}, or ask for at most {max(0, room + 1 - have)} new tokens",
        )
    low, high = {**entries["prefill"].dims, **(limits or {})}.get("length", (1, 0))
    if low <= have <= high:
        logits, *caches = run["prefill"]([tokens])
    else:
        caches = _empty(entries["decode"], tokens.shape[0])
        for position in range(have):
            logits, *caches = run["decode"](
                [tokens[:, position : position + 1].contiguous(), torch.tensor([position]), *caches]
            )
    done = torch.zeros(tokens.shape[0], dtype=torch.bool)
    for position in range(have, have + count):
        new = logits.argmax(-1)
        if stop is not None:
            new = torch.where(done, stop, new)
            done |= new == stop
        tokens = torch.cat([tokens, new[:, None]], 1)
        if position == have + count - 1 or bool(done.all()):
            break
        logits, *caches = run["decode"]([new[:, None], torch.tensor([position]), *caches])
    return tokens


def capacity_of(decode: Entry) -> int:
    """Positions that a decode entry's cache has room for."""
    return decode.dims["capacity"][0]


def logits_of(entry: Entry, rank: int = 3) -> list[int]:
    """Places among a forward's outputs that may be logits [batch, length, vocabulary], the likeliest first.

    `rank` 2: [batch, vocabulary], as a decoder may give them of the last position alone; but so does a classifier.
    """
    floats = ("float", "bfloat")
    places = [i for i, s in enumerate(entry.outputs) if len(s.shape) == rank and s.dtype.startswith(floats)]
    return sorted(places, key=lambda i: entry.outputs[i].name != "logits")


def roles_of(inputs: Sequence[torch.Tensor]) -> list[str] | None:
    """What each input of a decoder is, by its values: `tokens`, a mask that is `ones` everywhere, or `positions` 0, 1, 2 ...

    None: there is something else among them, or it cannot be told which are the tokens.
    """
    import torch

    if not inputs or any(t.dim() != 2 or t.shape != inputs[0].shape for t in inputs):
        return None
    found = []
    for tensor in inputs:
        every = torch.arange(tensor.shape[1], device=tensor.device)
        is_ones = bool((tensor == 1).all())
        is_positions = not tensor.is_floating_point() and bool((tensor == every).all())
        found.append("ones" if is_ones else "positions" if is_positions else "tokens")
    if len(inputs) == 1:
        found = ["tokens"]
    tokens = [tensor for tensor, role in zip(inputs, found, strict=True) if role == "tokens"]
    return found if len(tokens) == 1 and not tokens[0].is_floating_point() else None


def all_inputs(roles: Sequence[str], dtypes: Sequence[torch.dtype], tokens: torch.Tensor) -> list[torch.Tensor]:
    """A decoder's inputs for these tokens, by `roles_of`: nothing is masked, positions count from 0."""
    import torch

    made = {
        "tokens": tokens,
        "ones": torch.ones_like(tokens),
        "positions": torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens),
    }
    return [made[role].to(dtype) for role, dtype in zip(roles, dtypes, strict=True)]


def _empty(decode: Entry, batch: int) -> list[Any]:
    import torch

    return [
        torch.zeros([batch if isinstance(s, str) else s for s in spec.shape], dtype=getattr(torch, spec.dtype))
        for spec in decode.inputs
        if spec.name.startswith("cache_")
    ]


def _by_forward(served: Served, tokens: torch.Tensor, count: int, stop: int | None) -> torch.Tensor:
    """Every token by the whole prefix again."""
    import torch

    entry = served.manifest.entries["forward"]
    fits = len(entry.inputs) == 1 and entry.inputs[0].dtype.startswith("int") and len(entry.inputs[0].shape) == 2
    logits_at = logits_of(entry)
    if not fits or not logits_at or "length" not in entry.dims:
        raise ServeError(
            f"{served.folder}: it cannot generate: forward takes {', '.join(s.name for s in entry.inputs)} with shape "
            f"{list(entry.inputs[0].shape)}",
            hint="a decoder takes tokens [batch, length] of any length; export with --max-length N for one with a cache",
        )
    if tokens.shape[1] + count - 1 > entry.dims["length"][1]:
        raise ServeError(
            f"{served.folder}: {tokens.shape[1]} tokens and {count} new ones are more than the {entry.dims['length'][1]} "
            "positions it was exported for"
        )
    function = _positional(served.entry("forward"))
    dtype = getattr(torch, entry.inputs[0].dtype)
    done = torch.zeros(tokens.shape[0], dtype=torch.bool)
    for _ in range(count):
        new = function([tokens.to(dtype)])[logits_at[0]][:, -1].argmax(-1)
        if stop is not None:
            new = torch.where(done, stop, new)
            done |= new == stop
        tokens = torch.cat([tokens, new[:, None].to(tokens.dtype)], 1)
        if bool(done.all()):
            break
    return tokens
