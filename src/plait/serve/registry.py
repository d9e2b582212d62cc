"""The serving backends that are installed, by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module, metadata

from plait.capture.arguments import nearest
from plait.errors import ServeError
from plait.serve.backend import Backend

__all__ = ["GROUP", "backend_at", "backends", "chosen"]

GROUP = "plait.backends"


def backends() -> dict[str, str]:
    """Name -> `module:class` of every backend that some installed package names, in order of name; nothing is imported."""
    return dict(sorted((point.name, point.value) for point in metadata.entry_points(group=GROUP)))


def chosen(names: str | Sequence[str]) -> dict[str, str]:
    """Those of a list such as `onnxruntime,openvino`; `all` are all.

    Raises:
        ServeError: there is none of that name; the nearest is offered.
    """
    known = backends()
    if not known:
        raise ServeError("export: no backend is registered", hint="install plait itself: pip install plait")
    words = names.split(",") if isinstance(names, str) else list(names)
    found: dict[str, str] = {}
    for word in (w.strip().lower() for w in words):
        if word == "all":
            found.update(known)
        elif word in known:
            found[word] = known[word]
        else:
            raise ServeError(
                f"export: no backend {word!r}{nearest(word, known)}", hint=f"--to takes {', '.join(known)}, or all"
            )
    return found


def backend_at(place: str) -> Backend:
    """The backend of `module:class`.

    Raises:
        ServeError: it cannot be imported or made, or is no backend.
    """
    module, _, name = place.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except Exception as problem:  # somebody's package, which may raise whatever it likes
        raise ServeError(f"backend {place}: it cannot be imported ({_in_a_line(problem)})") from None
    if not (isinstance(kind, type) and issubclass(kind, Backend)):
        raise ServeError(f"backend {place}: not a subclass of plait.serve.backend.Backend")
    try:
        return kind()
    except Exception as problem:
        raise ServeError(f"backend {place}: it cannot be made ({_in_a_line(problem)})") from None


def _in_a_line(problem: Exception) -> str:
    text = " ".join(str(problem).split())[:300]
    return text if isinstance(problem, ImportError | AttributeError) else f"{type(problem).__name__}: {text}"
