"""serve.sh beside an export's artefacts: starts a server's processes, each with its threads, on its cores, near its memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.hardware.placement import places_here

__all__ = ["MARK", "NAME", "start_file"]

NAME = "serve.sh"
MARK = "Written by each `plait export`"  # by which a file of that name is known to be one


def start_file(name: str, folder: Path, rows: list[dict[str, Any]], tuned: Mapping[str, Any] | None) -> str:
    """The script's text: readable, commented, for an export of the model `name` into `folder`.

    `tuned`: the report's own, whose settings one process starts with. Threads and cores are asked for where it is started
    (`python -m plait.hardware.placement`), because that may be another computer; what they are on this one stands in a comment.
    """
    good = [row["folder"] for row in rows if row["status"] == "ok" and "folder" in row]
    place = Path(tuned["folder"] if tuned else good[0])
    loaded = f'plait.serve.load_tuned("{folder / "tune.json"}")' if tuned else f'plait.serve.load("{place}")'
    parts = [_HEAD.format(name=name, mark=MARK, loaded=loaded, more=_more(tuned), chosen=_chosen())]
    if tuned:
        parts.append(_settings(tuned))
    return "".join((*parts, _BODY))


def _more(tuned: Mapping[str, Any] | None) -> str:
    return (
        "#                       with PROCESSES of 2 and more: plait.serve.load, since tune.json is of one process alone\n"
        if tuned
        else ""
    )


def _chosen() -> str:
    """What `places_here` gives on this computer, by number of processes."""
    lines = []
    environment = {n: v for n, v in os.environ.items() if n != "OMP_NUM_THREADS"}  # the user's is for this shell
    for count in (1, 2, 4):
        places = places_here(count, environment)
        cores = " | ".join(",".join(map(str, one.cpus)) or "any" for one in places)
        lines.append(f"#     {places[0].reason}; cores: {cores}\n")
    return "".join(lines)


def _settings(tuned: Mapping[str, Any]) -> str:
    lines = ["\n# One process: as `plait export --tune` measured it (tune.json). What is set already wins.\n"]
    lines.append('if [ "$PROCESSES" = 1 ]; then\n')
    for name, value in tuned["environment"].items():
        lines.append(f'    export {name}="${{{name}:-{value}}}"\n')
    return "".join((*lines, "fi\n"))


_HEAD = """\
#!/usr/bin/env bash
# Starts servers of {name} on this computer's CPU. {mark}: copy it to change it.
#
#     bash serve.sh python server.py                one process
#     PROCESSES=2 bash serve.sh python server.py    two, each on its own share of the cores; PLAIT_INDEX is 0 in the first
#
# In server.py:    served = {loaded}; outputs = served(inputs)
{more}#
# Threads and cores, on the computer of the export:
{chosen}\
# OMP_NUM_THREADS in the environment wins; PLAIT_PIN=0, OMP_PLACES, OMP_PROC_BIND and the like leave the cores alone.
set -euo pipefail
if [ $# = 0 ]; then
    echo "usage: [PROCESSES=N] bash $0 COMMAND..." >&2
    exit 2
fi
PROCESSES="${{PROCESSES:-1}}"
# An interpreter that has plait; it is asked for the threads, the cores and numactl's words of each process.
PYTHON="${{PYTHON:-$(command -v python || command -v python3)}}"
"""

_BODY = """
start() {
    local index="$1" words
    shift
    words="$("$PYTHON" -m plait.hardware.placement --processes "$PROCESSES" --index "$index" --start)"
    echo "server $index: $words" >&2
    # shellcheck disable=SC2086 # these are words
    PLAIT_INDEX="$index" exec $words "$@"
}

if [ "$PROCESSES" = 1 ]; then
    start 0 "$@"
fi
# When one fails, all end, with its status: whoever supervises them starts them together.
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
trap 'exit 143' TERM INT
for ((index = 0; index < PROCESSES; index++)); do
    start "$index" "$@" &
    pids+=("$!")
done
for ((index = 0; index < PROCESSES; index++)); do
    wait -n
done
"""
