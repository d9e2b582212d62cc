"""Where an export writes: refused beforehand where it may not; a folder gets its name when everything in it is there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from plait.errors import ServeError
from plait.serve.manifest import FORMAT, MANIFEST
from plait.serve.start_file import MARK, NAME

__all__ = ["check_output", "finished_folder", "write_whole"]

_TRIES = 20  # of taking a final name, while another export takes it, too


def check_output(out: Path, names: Iterable[str]) -> None:
    """Refuse an output folder that cannot be written, or in which something that is no export's has one of the names.

    Raises:
        ServeError: with what is in the way.
    """
    above = next(part for part in (out.absolute(), *out.absolute().parents) if os.path.lexists(part))
    if not above.is_dir():
        raise ServeError(
            f"export: {above} is a {'link to nothing' if above.is_symlink() else 'file'}, so {out} cannot be a folder in which "
            "artefacts lie",
            hint="give another folder with --output",
        )
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as problem:
        raise ServeError(
            f"export: nothing can be written into {above}: {problem.strerror or problem}",
            hint="give another folder with --output; if the disk is full, free some space",
        ) from None
    for name in names:
        _refuse_foreign(out / name)
    report, start = out / "report.json", out / NAME
    if os.path.lexists(report) and not _is_report(report):
        raise _in_the_way(report, "no export's report")
    if os.path.lexists(start) and MARK not in _text(start):
        raise _in_the_way(start, "not written by an export")


def _refuse_foreign(folder: Path) -> None:
    """What would be replaced has to be an artefact, or empty."""
    # Looked at again before it is refused: another export may just be replacing its own.
    if os.path.lexists(folder) and all(_is_foreign(folder) for _ in range(3)):
        why = f"not an artefact of plait (it has no {MANIFEST} of one)" if folder.is_dir() else "no folder"
        raise _in_the_way(folder, why)


def _is_foreign(folder: Path) -> bool:
    try:
        if folder.is_symlink() or not folder.is_dir():
            return os.path.lexists(folder)
        return any(folder.iterdir()) and f'"{FORMAT}"' not in _text(folder / MANIFEST)
    except FileNotFoundError:
        return False


def _in_the_way(path: Path, why: str) -> ServeError:
    return ServeError(
        f"export: {path} is in the way: it is {why}, and the export would replace it",
        hint="move it away, or give another folder with --output",
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _is_report(path: Path) -> bool:
    try:
        data = json.loads(_text(path))
    except ValueError:
        return False
    return isinstance(data, dict) and {"plait", "rows", "weights_sha256"} <= set(data)


@contextmanager
def finished_folder(final: Path) -> Iterator[Path]:
    """An empty folder that takes the final name when the block ends well, and is gone when it does not.

    An older artefact of that name is replaced only then; whoever finishes last of two at a time stays.

    Raises:
        ServeError: what has the name is no artefact.
    """
    _refuse_foreign(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        _take_name(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _take_name(aside: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    for last in (False,) * _TRIES + (True,):
        try:
            aside.rename(final)  # where there is nothing, or an empty folder
        except OSError as problem:
            if last or problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            with suppress(FileNotFoundError):  # another export has just put it aside
                final.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        else:
            return


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all.

    Raises:
        OSError: it cannot be written; nothing is left.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
