"""Trained models, exported to the runtimes that people serve with.

runtimes/   one file a runtime: what it writes, and how it is run
decoding/   prefill and decode with a key-value cache, derived from the forward's graph
tuning/     settings that serve an artefact fastest here
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.serve.served import load as load
    from plait.serve.tuning.tune import load_tuned as load_tuned

__all__ = ["load", "load_tuned"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from plait.serve.served import load

        return load
    if name == "load_tuned":
        from plait.serve.tuning.tune import load_tuned

        return load_tuned
    raise AttributeError(f"module 'plait.serve' has no attribute {name!r}")
