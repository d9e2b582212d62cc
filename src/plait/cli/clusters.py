"""The --cluster option: a name or a file; processes of this computer are measured first if they have not been."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from plait.schema import Cluster

__all__ = ["ClusterName", "cluster_of"]

ClusterName = Annotated[
    str,
    typer.Option(
        "--cluster",
        metavar="NAME|FILE",
        help="COUNTxPART such as 8xH100-SXM, 64xA100-SXM-80GB or 4xcpu (this computer), or a YAML file.",
        show_default=False,
    ),
]


def cluster_of(text: str) -> Cluster:
    """The cluster; this computer is probed once where it was not yet.

    Raises:
        HardwareError: the name or file is not understood.
    """
    if re.fullmatch(r"\d+\s*x\s*cpu", text.strip(), re.IGNORECASE):
        from plait.hardware.probe import load_probe, probe_machine, save_probe

        if load_probe() is None:
            print("this computer is measured once, about a minute", file=sys.stderr, flush=True)
            save_probe(probe_machine(say=lambda line: print(f"  {line}", file=sys.stderr, flush=True)))
    from plait.hardware.clusters import with_price_notes

    return with_price_notes(Cluster.load(text))
