"""Which needs of serving an answer misses, and what is nearest where all miss some."""

from __future__ import annotations

from collections.abc import Sequence

from plait.advice.needs import Needs
from plait.advice.serve_answer import ServeAnswer, usd_of
from plait.advice.shapes import LARGEST
from plait.cost.serving_work import Served
from plait.errors import RequestError

__all__ = ["misses", "nearest"]


def misses(answer: ServeAnswer, needs: Needs) -> tuple[str, ...]:
    """The needs that an answer does not meet."""
    found = answer.estimate
    late = {
        f"--latency-ms {needs.latency_ms or 0:g}": needs.latency_ms is not None
        and found.latency * 1e3 > needs.latency_ms,
        f"--first-token-ms {needs.first_token_ms or 0:g}": needs.first_token_ms is not None
        and found.first_token * 1e3 > needs.first_token_ms,
        f"--budget {needs.budget or 0:g}": needs.budget is not None and usd_of(answer, needs) > needs.budget,
        f"--deadline {needs.deadline or 0:g}": needs.deadline is not None and answer.hours > needs.deadline,
        f"--throughput {needs.throughput or 0:g}": needs.throughput is not None and answer.count > LARGEST,
    }
    return tuple(name for name, missed in late.items() if missed)


def nearest(
    answers: Sequence[ServeAnswer], needs: Needs, served: Served, failed: Sequence[tuple[str, str]]
) -> RequestError:
    """The error when nothing meets the needs: which of them clash, and what comes nearest to each."""
    if not answers:
        why = "; ".join(f"{name}: {reason}" for name, reason in failed[:3])
        return RequestError(
            f"no offer that meets the needs can hold the model's {served.parameters / 1e9:,.1f} billion parameters"
            + (f": {why}" if why else ""),
            hint="drop one of --require, --clouds, --only, or halve the weights with --precision fp8 or int8",
        )
    stated = sorted({name for a in answers for name in misses(a, needs)})
    hints = []
    for name in stated:
        others = [a for a in answers if not set(misses(a, needs)) - {name}]
        if others:
            closest = min(others, key=lambda a: _distance(a, name, needs))
            hints.append(f"without {name}: {_told(closest, needs)}")
    for name in stated:
        least = min(answers, key=lambda a: _distance(a, name, needs))
        if all(_told(least, needs) not in hint for hint in hints):
            hints.append(f"nearest to {name}: {_told(least, needs)}")
    alone = [name for name in stated if all(name in misses(a, needs) for a in answers)]
    if alone:
        return RequestError(f"no offer meets {' and '.join(alone)}", hint="; ".join(hints[:4]))
    return RequestError(f"{' and '.join(stated)} clash: each can be met, not all", hint="; ".join(hints[:4]))


def _distance(answer: ServeAnswer, name: str, needs: Needs) -> float:
    found = answer.estimate
    return {
        "--latency-ms": found.latency,
        "--first-token-ms": found.first_token,
        "--budget": usd_of(answer, needs),
        "--deadline": answer.hours,
        "--throughput": answer.count,
    }[name.partition(" ")[0]]


def _told(answer: ServeAnswer, needs: Needs) -> str:
    found = answer.estimate
    return (
        f"{answer.name}: {found.latency * 1e3:,.3g} ms, first token {found.first_token * 1e3:,.3g} ms, {answer.hours:,.3g} h, "
        f"${usd_of(answer, needs):,.4g}"
    )
