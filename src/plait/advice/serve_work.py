"""What has to be served: how long requests are and how many tokens or samples, given or a default that says why."""

from __future__ import annotations

from dataclasses import dataclass

from plait.advice.needs import Needs
from plait.cost.serving import Load
from plait.cost.serving_work import Served
from plait.errors import RequestError
from plait.schema.graph import Graph, ParameterSpec
from plait.schema.records import Record

__all__ = ["ServeWork", "serve_work_of"]

# Lengths of chat: within those that TensorRT-LLM's and vLLM's published tables use.
_INPUT, _OUTPUT = 1000, 250
_AMOUNT = 1e6  # so that dollars are dollars for a million


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeWork(Record):
    """The load, and how much of it dollars and hours are for."""

    load: Load
    load_why: str
    unit: str
    """output tokens or samples."""
    each: str
    """One of them."""
    amount: float
    """Output tokens, or samples."""
    amount_why: str
    notes: tuple[str, ...] = ()


def serve_work_of(graph: Graph, served: Served, needs: Needs) -> ServeWork:
    """The load of `needs`, with defaults where it says nothing.

    Raises:
        RequestError: a request is longer than the model's table of positions.
    """
    amount, why = needs.tokens or _AMOUNT, "as given by --tokens" if needs.tokens else "default: a million"
    notes: list[str] = []
    if not served.decodes or needs.output_tokens == 0:
        if needs.output_tokens or (needs.input_tokens and not served.decodes):
            notes.append("--input-tokens and --output-tokens do not matter: the model makes no tokens one by one")
        length = needs.input_tokens or 0 if served.decodes else 0
        shape = f"of {length or served.length} positions" if served.length > 1 else "of the job's own shape"
        return ServeWork(
            load=Load(input_tokens=length), load_why=f"a plain forward of samples {shape}", unit="samples", each="batch",
            amount=amount, amount_why=why, notes=tuple(notes),
        )  # fmt: skip
    given = needs.input_tokens is not None or needs.output_tokens is not None
    prompt, reply = needs.input_tokens or _INPUT, needs.output_tokens or _OUTPUT
    reason = "as given" if given else f"default: prompts of {prompt:,} and replies of {reply:,} tokens"
    encoder = served.encoder
    if encoder is not None and served.is_fixed:
        if needs.input_tokens not in (None, encoder.length):
            raise RequestError(
                f"--input-tokens {needs.input_tokens}: the encoder's input is no text, it has {encoder.length:,} positions",
                hint="leave --input-tokens out; another length is another shape of the job's own sample",
            )
        prompt = encoder.length
        reason = f"{prompt:,} positions of the encoder, as the job's sample has; replies of {reply:,} tokens"
    most = _positions(graph)
    if most is not None and (max(prompt, reply) if encoder else prompt + reply) > most:
        if given:
            raise RequestError(
                f"prompts of {prompt:,} and replies of {reply:,} tokens are more than the model's {most:,} positions",
                hint=f"--input-tokens and --output-tokens may add up to {most}; a model with a longer table takes more",
            )
        if encoder is None:
            prompt, reply = max(1, most * 3 // 4), max(1, most // 4)
            reason = f"default: three quarters and a quarter of the model's {most} positions"
        else:
            prompt, reply = prompt if served.is_fixed else min(prompt, most), min(reply, most)
            reason = f"default: prompts of {prompt:,} and replies of {reply:,} tokens, as its tables of positions allow"
    if encoder is not None:
        notes.append(
            "an encoder-decoder: the encoder runs once over a prompt, then tokens are made one by one; which of them a runtime takes is its own to say"
        )
        return ServeWork(load=Load(input_tokens=prompt, output_tokens=reply), load_why=reason, unit="output tokens", each="token",
                         amount=amount, amount_why=why, notes=tuple(notes))  # fmt: skip
    if served.attention_flops == 0:
        notes.append("without attention it keeps a state of fixed size, which is not counted in its memory")
    notes.append(
        "taken to make tokens one by one, since it scores its own vocabulary; --output-tokens 0 for a plain forward"
    )
    return ServeWork(
        load=Load(input_tokens=prompt, output_tokens=reply), load_why=reason, unit="output tokens", each="token", amount=amount,
        amount_why=why, notes=tuple(notes),
    )  # fmt: skip


def _positions(graph: Graph) -> int | None:
    """Rows of the table of positions: not looked up with tokens, and as wide as theirs; None where there is none."""
    tables: list[tuple[int, int, bool]] = []
    for segment in graph.segments:
        for op in segment.operators:
            spec = next((s for n in op.parameters for s in [_spec(graph, n)] if s is not None), None)
            if op.kind == "embedding" and op.outputs and spec is not None and len(spec.shape) == 2:
                by_token = any(x.name == source.name for source in graph.inputs for x in op.inputs)
                tables.append((spec.shape[0], spec.shape[1], by_token))
    # The largest is the tokens'. A table of relative positions is as wide as there are heads.
    width = max(tables, default=(0, 0, False))[1]
    return min((rows for rows, wide, by_token in tables if not by_token and wide == width), default=None)


def _spec(graph: Graph, name: str) -> ParameterSpec | None:
    return next((s for s in graph.parameters if name == s.name or name in s.aliases), None)
