"""Units at the edges. Inside plait everything is SI: bytes, seconds, FLOP, FLOP/s."""

from __future__ import annotations

__all__ = ["GB", "GIB", "KIB", "MIB", "TERA", "format_bytes", "format_count", "format_seconds", "gib"]

KIB = 2**10
MIB = 2**20
GIB = 2**30
GB = 10**9
TERA = 10**12


def gib(nbytes: float) -> float:
    """GiB (2^30 bytes) in `nbytes`."""
    return nbytes / GIB


def format_bytes(nbytes: float) -> str:
    """Text such as `9.0 GiB`, three significant digits at most."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_count(count: float) -> str:
    """Text such as `10.6 M`."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.1f} {suffix}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """Text such as `1.5 ms`, `2.0 s`, `3 min 05 s`, `4 h 10 min`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60):02d} s"
    return f"{int(minutes // 60)} h {int(minutes % 60):02d} min"
