"""Which backend is the quickest, for each precision, batch size and number of threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["best_rows", "latency_rows"]


def latency_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(backend's row, one of its latencies) of those that work."""
    return [(row, one) for row in rows if row["status"] == "ok" for one in row.get("latency", ())]


def best_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The least ratio to eager in each precision, entry point, batch size and number of threads.

    By the ratio and not the latency: each was measured in turn with eager in a process of its own, at its own time.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row, one in latency_rows(rows):
        key = (row["precision"], one["entry"], one["batch"], one["threads"])
        names = ("precision", "entry", "batch", "threads")
        if key not in found or one["ratio"] < found[key]["ratio"]:
            found[key] = {**dict(zip(names, key, strict=True)), "backend": row["backend"], "ratio": one["ratio"]}
    return list(found.values())
