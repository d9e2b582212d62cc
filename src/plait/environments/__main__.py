"""`python -m plait.environments make|list|remove`: environments for what cannot be installed beside plait's torch."""

from __future__ import annotations

import argparse
import json
import sys

from plait.environments.make import find, installed, make, remove
from plait.environments.names import NAMES
from plait.errors import PlaitError, RequestError

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Exit status."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.verb == "list":
            _list(as_json=asked.json)
        elif asked.verb == "remove":
            _say("removed" if remove(asked.name) else f"environment {asked.name} was not there")
        else:
            _make(asked)
    except PlaitError as problem:
        _say(f"error: {problem}")
        return problem.exit_status
    except KeyboardInterrupt:
        _say("stopped; nothing half-made is kept")
        return 130
    return 0


def _make(asked: argparse.Namespace) -> None:
    if not asked.again:
        try:
            python = find(asked.name)
        except RequestError:
            pass  # the usual case: it is to be made
        else:
            _say(f"environment {asked.name} is there: {python} (--again makes it anew)")
            return
    make(asked.name, python=asked.python, time_limit=asked.time_limit, say=_say)


def _list(*, as_json: bool) -> None:
    rows = installed()
    if as_json:
        sys.stdout.write(json.dumps({"environments": rows}) + "\n")
        return
    for row in rows:
        if row["made"]:
            versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
            sys.stdout.write(f"{row['name']:<11} {row['size_gib']:.2f} GiB  {versions}\n{'':<11} {row['path']}\n")
        else:
            sys.stdout.write(f"{row['name']:<11} not made  {row['purpose']}\n")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m plait.environments", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="make|list|remove")
    maker = verbs.add_parser("make", help="make one (downloads with pip)")
    maker.add_argument("name", choices=NAMES)
    maker.add_argument("--python", metavar="PATH", help="interpreter to make it with; default: this one")
    maker.add_argument("--time-limit", type=float, default=3600.0, metavar="SECONDS", help="for pip")
    maker.add_argument("--again", action="store_true", help="make it anew if it is there")
    lister = verbs.add_parser("list", help="what is made: size, versions, path")
    lister.add_argument("--json", action="store_true", help="one JSON object on stdout")
    remover = verbs.add_parser("remove", help="delete one")
    remover.add_argument("name", choices=NAMES)
    return parser


if __name__ == "__main__":
    sys.exit(main())
