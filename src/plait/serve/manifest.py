"""manifest.json of an artefact: what it serves, and the size and hash of every file.

Everything in it is checked before it is used: it may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from plait.errors import ServeError
from plait.serve.backend import PRECISIONS
from plait.serve.subject import Entry

__all__ = ["FORMAT", "MANIFEST", "Manifest", "folder_bytes"]

MANIFEST = "manifest.json"
FORMAT = "plait artefact 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What an artefact is."""

    backend: str
    precision: str
    entries: Mapping[str, Entry]
    source: str
    weights_sha256: str
    plait: str
    """Version."""
    versions: Mapping[str, str]
    """Of torch and the runtime's packages, when it was exported."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """File name -> (bytes, SHA-256)."""

    def write(self, folder: Path) -> None:
        """Write it beside the files, which it describes as they are now."""
        files = {
            path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)]
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        data = {
            "format": FORMAT,
            "backend": self.backend,
            "precision": self.precision,
            "entries": {name: entry.to_dict() for name, entry in self.entries.items()},
            "source": self.source,
            "weights_sha256": self.weights_sha256,
            "plait": self.plait,
            "versions": dict(self.versions),
            "facts": dict(self.facts),
            "files": files,
        }
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of a folder whose files are all there, plain, inside of it, and as they were written.

        Raises:
            ServeError: it is none, it is malformed, or a file is missing, changed, or outside of the folder.
        """
        try:
            data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError(f"not of the format {FORMAT!r}")
            files = {str(name): (int(nbytes), str(digest)) for name, (nbytes, digest) in data.pop("files").items()}
            entries = {str(name): Entry.from_dict(entry) for name, entry in data.pop("entries").items()}
            facts, versions = data.pop("facts"), data.pop("versions")
            texts = {name: data.pop(name) for name in ("backend", "precision", "source", "weights_sha256", "plait")}
            if not isinstance(facts, dict) or not isinstance(versions, dict) or not entries:
                raise TypeError("facts, versions and entries must be objects")
            if not all(isinstance(text, str) for text in texts.values()):
                raise TypeError(f"{', '.join(texts)} must be text")
            if texts["precision"] not in PRECISIONS:
                raise ValueError(f"no precision {texts['precision']!r}")
        except FileNotFoundError:
            raise ServeError(
                f"{folder}: there is no {MANIFEST}; it is no exported artefact",
                hint="give the folder of one backend, such as exports/gpt/onnxruntime",
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise ServeError(f"{folder}: {MANIFEST} is malformed: {problem!r}") from None
        for name, (nbytes, digest) in files.items():
            _check_file(folder, name, nbytes, digest)
        for name, entry in entries.items():
            if name != entry.name or not name.isidentifier():
                raise ServeError(f"{folder}: {MANIFEST} is malformed: entry point {name!r}")
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        unknown = sorted(present - set(files) - {MANIFEST})
        if unknown:
            raise ServeError(f"{folder}: {unknown[0]} is not in {MANIFEST}; the folder was changed after the export")
        return cls(entries=entries, facts=facts, versions=versions, files=files, **texts)


def _check_file(folder: Path, name: str, nbytes: int, digest: str) -> None:
    path = folder / name
    outside = Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name
    if outside or not path.resolve().is_relative_to(folder.resolve()):
        raise ServeError(f"{folder}: {MANIFEST} names {name!r}, which is outside of the folder; refused")
    if not path.is_file() or path.is_symlink():
        raise ServeError(f"{folder}: {name} is missing or no plain file")
    if path.stat().st_size != nbytes or _sha256(path) != digest:
        raise ServeError(f"{folder}: {name} is truncated or was changed after the export")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files but the manifest."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
