"""One file of weights for several OpenVINO models: a decoder's forward, prefill and decode hold the same ones.

forward.xml, prefill.xml, decode.xml     graphs; every constant says at which offset of the file its bytes lie
weights.bin                              every constant once, by its bytes
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["WEIGHTS", "share_weights"]

WEIGHTS = "weights.bin"
_ALIGNED = 64  # bytes; a cache line, and what the runtime's own writer gives
_PLACE = re.compile(rb'(<data\b[^>]*?\boffset=")(\d+)("[^>]*?\bsize=")(\d+)(")')
"""Of a constant, as `openvino.save_model` writes it; other operators have no data with offset and size."""


def share_weights(paths: Iterable[Path]) -> int:
    """Replace the `.bin` of each `.xml`, all in one folder, by a common `weights.bin`; gives its bytes."""
    paths = list(paths)
    known: dict[bytes, int] = {}
    with (paths[0].parent / WEIGHTS).open("wb") as shared:
        for path in paths:
            own = path.with_suffix(".bin")
            text = path.read_bytes()
            if own.stat().st_size:
                with own.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    text = _PLACE.sub(lambda found, data=data: _moved(found, data, shared, known), text)  # type: ignore[misc]
            path.write_bytes(text)
            own.unlink()
        return shared.tell()


def _moved(found: re.Match[bytes], data: Any, shared: Any, known: dict[bytes, int]) -> bytes:
    before, offset, between, size, after = found.groups()
    part = data[int(offset) : int(offset) + int(size)]
    digest = hashlib.sha256(part).digest() + size
    if digest not in known:
        shared.write(b"\0" * (-shared.tell() % _ALIGNED))
        known[digest] = shared.tell()
        shared.write(part)
    return b"%b%d%b%b%b" % (before, known[digest], between, size, after)
