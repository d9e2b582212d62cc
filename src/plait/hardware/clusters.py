"""Clusters by name (`64xA100-SXM-80GB`, `8xH100+8xV100`) and from YAML files."""

from __future__ import annotations

import datetime
import functools
import math
import re
import reprlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.errors import HardwareError
from plait.hardware.catalogue import Accelerator, find
from plait.hardware.offers import age_warning, cheapest
from plait.hardware.tables import DATA, number, rows
from plait.schema.cluster import Cluster, Group, Link
from plait.units import GB

__all__ = ["load_cluster", "named_cluster", "network_of", "with_price_notes"]

_NAME = re.compile(r"^(\d+)\s*x\s*(.+)$", re.IGNORECASE)
_USUAL_NODE = 8
# A node of these holds several devices of another row; the node's own row adds their figures up.
_NODE_PARTS = {"Meta ZionEX node (8x A100 40GB)": ("NVIDIA A100 SXM4 40GB", 8)}
_NODE_LATENCY = 6e-6  # s, NCCL over NVLink or ICI inside a node; general knowledge, refitted in cost/data


@dataclass(frozen=True)
class _Network:
    part: str
    level: str
    size: int | None
    bandwidth: float
    latency: float
    name: str
    source: str


def network_of(part: Accelerator, level: str) -> _Network | None:
    """The usual network of `part` at `level` (node: the slot; site: between nodes); None: no source says."""
    found = {network.part: network for network in _networks() if network.level == level}
    return found.get(part.name) or found.get(part.device.family)


@functools.cache
def _networks() -> tuple[_Network, ...]:
    found: list[_Network] = []
    columns = ("part", "level", "size", "bandwidth_gbs", "latency_us", "name", "source")
    for where, cells in rows(DATA / "networks.csv", columns):
        bandwidth, latency = (number(where, cells, c) for c in ("bandwidth_gbs", "latency_us"))
        size = number(where, cells, "size")
        if bandwidth is None or latency is None:
            raise HardwareError(f"{where}: bandwidth_gbs and latency_us are needed")
        found.append(
            _Network(
                cells["part"],
                cells["level"],
                None if size is None else int(size),
                bandwidth * GB,
                latency * 1e-6,
                cells["name"],
                cells["source"],
            )
        )
    return tuple(found)


def _links(part: Accelerator, count: int, per_node: int | None, site: _Network | None) -> tuple[Link, ...]:
    """The levels that `count` devices of one kind need."""
    scale_up = part.max_scale_up or _USUAL_NODE
    node = per_node or (scale_up if scale_up >= 4 else _USUAL_NODE)
    links: list[Link] = []
    fast = part.link_bandwidth
    if count > 1 and fast is None:
        raise HardwareError(
            f"{part.name}: the bandwidth between devices is not known, and {count} devices need it",
            hint="describe the cluster in a YAML file: docs/hardware.md shows one",
        )
    if fast is not None and scale_up >= min(node, 4):
        level = "rack" if scale_up > 16 else "node"
        size = scale_up if level == "rack" else min(node, scale_up)
        if level == "rack" and per_node:
            links.append(
                Link(
                    level="node",
                    size=per_node,
                    bandwidth=fast,
                    latency=_NODE_LATENCY,
                    name=part.link_name,
                    source=part.device.source,
                )
            )
        links.append(
            Link(
                level=level,
                size=size,
                bandwidth=fast,
                latency=_NODE_LATENCY,
                name=part.link_name,
                source=part.device.source,
            )
        )
    elif fast is not None:
        slot = network_of(part, "node")
        if scale_up == 2 and slot is not None:
            links.append(
                Link(
                    level="device",
                    size=2,
                    bandwidth=fast,
                    latency=_NODE_LATENCY,
                    name=part.link_name,
                    source=part.device.source,
                )
            )
        bandwidth, latency = (slot.bandwidth, slot.latency) if slot else (fast, 10e-6)
        links.append(
            Link(
                level="node",
                size=node,
                bandwidth=bandwidth,
                latency=latency,
                name=slot.name if slot else part.link_name,
                source=slot.source if slot else part.device.source,
            )
        )
    largest = links[-1].size if links else 1
    if count > largest:
        between = site or network_of(part, "site")
        if between is None:
            raise HardwareError(
                f"{part.name}: the network between nodes of {largest} is not known, and {count} devices need it",
                hint="describe the cluster in a YAML file: docs/hardware.md shows one",
            )
        links.append(
            Link(
                level="site",
                size=count,
                bandwidth=between.bandwidth,
                latency=between.latency,
                name=between.name,
                source=between.source,
            )
        )
    return tuple(links)


def uniform_cluster(
    part: Accelerator, count: int, *, per_node: int | None = None, inter_node: float | None = None, name: str = ""
) -> Cluster:
    """`count` devices of one kind; `inter_node` in bytes/s for each device replaces the usual network.

    Raises:
        HardwareError: a figure that several devices need is not known.
    """
    site = None
    if inter_node is not None:
        usual = network_of(part, "site")
        site = _Network(
            part.name, "site", None, inter_node, usual.latency if usual else 10e-6, "as stated", "as stated"
        )
    links = _links(part, count, per_node, site)
    offer = cheapest(part.name)
    notes = [f"{part.name}: figures are not verified ({part.device.source})"] if not part.device.verified else []
    return Cluster(
        name=name or f"{count}x{part.aliases[0] if part.aliases else part.name}",
        groups=(
            Group(
                device=part.device,
                count=count,
                usd_per_hour=offer.price() if offer else None,
                price_as_of=offer.as_of if offer else "",
                price_source=f"{offer.cloud} {offer.instance_type} {offer.region}" if offer else "",
            ),
        ),
        links=links,
        notes=tuple(notes),
    )


def named_cluster(name: str) -> Cluster:
    """The cluster called COUNTxPART, or several joined with `+`.

    Raises:
        HardwareError: the name is malformed, the part unknown, or a figure it needs is missing.
    """
    pieces = []
    for piece in name.split("+"):
        match = _NAME.match(piece.strip())
        if match is None or int(match[1]) < 1:
            raise HardwareError(
                f"cluster {name!r} is neither a file nor COUNTxPART",
                hint="write for example 8xH100-SXM, 64xA100-SXM-80GB, 4xcpu, or the path of a YAML file",
            )
        pieces.append((int(match[1]), match[2].strip()))
    if [word.lower() for _, word in pieces] == ["cpu"]:
        return Cluster.local(devices=pieces[0][0])
    clusters = [_one(count, word) for count, word in pieces]
    return clusters[0] if len(clusters) == 1 else _joined(name, clusters)


def _one(count: int, word: str) -> Cluster:
    part = find(word)
    if part.name in _NODE_PARTS:
        inner, per_node = _NODE_PARTS[part.name]
        if part.link_bandwidth is None:
            raise HardwareError(f"{part.name}: its network is not known")
        whole = uniform_cluster(
            find(inner),
            count * per_node,
            per_node=per_node,
            inter_node=part.link_bandwidth / per_node,
            name=f"{count}x{word}",
        )
        return Cluster(
            name=whole.name,
            groups=whole.groups,
            links=whole.links,
            notes=(f"{count} nodes of {per_node} {inner}", f"{part.name}: not verified ({part.device.source})"),
        )
    if not part.device.trains:
        raise HardwareError(
            f"{part.name} runs compiled inference graphs only and cannot train",
            hint="`plait hardware list --trains` prints the parts that can",
        )
    return uniform_cluster(part, count, name=f"{count}x{word}")


def _joined(name: str, clusters: list[Cluster]) -> Cluster:
    """Several clusters side by side: nodes of the smallest size, the slowest network between them."""
    groups = tuple(group for cluster in clusters for group in cluster.groups)
    total = sum(group.count for group in groups)
    inner = [cluster.links[0] for cluster in clusters if cluster.links]
    outer = [cluster.links[-1] for cluster in clusters if cluster.links and cluster.links[-1].level == "site"]
    for cluster in clusters:
        network = network_of(find(cluster.groups[0].device.name), "site")
        if network is not None:
            outer.append(
                Link(
                    level="site",
                    size=total,
                    bandwidth=network.bandwidth,
                    latency=network.latency,
                    name=network.name,
                    source=network.source,
                )
            )
    if not outer:
        raise HardwareError(
            f"cluster {name}: the network between its groups is not known",
            hint="describe the cluster in a YAML file: docs/hardware.md shows one",
        )
    slow = min(outer, key=lambda link: link.bandwidth)
    links = []
    if inner:
        least = min(inner, key=lambda link: link.bandwidth)
        size = math.gcd(
            *(min(link.size, cluster.groups[0].count) for link, cluster in zip(inner, clusters, strict=False))
        )
        if size > 1:
            links.append(
                Link(
                    level="node",
                    size=size,
                    bandwidth=least.bandwidth,
                    latency=least.latency,
                    name=least.name,
                    source=least.source,
                )
            )
    links.append(
        Link(
            level="site", size=total, bandwidth=slow.bandwidth, latency=slow.latency, name=slow.name, source=slow.source
        )
    )
    return Cluster(
        name=name,
        groups=groups,
        links=tuple(links),
        notes=tuple(note for cluster in clusters for note in cluster.notes),
    )


def with_price_notes(cluster: Cluster) -> Cluster:
    """The cluster with a note for each price that is older than 90 days or has no date, for an answer with money in it."""
    warnings = [
        f"{group.device.name}: {warning}"
        for group in cluster.groups
        if group.usd_per_hour
        and group.price_as_of
        and (warning := age_warning(group.price_as_of, group.price_source or "the cloud"))
    ]
    return replace(cluster, notes=tuple(dict.fromkeys((*cluster.notes, *warnings))))


def load_cluster(text: str) -> Cluster:
    """A cluster from a YAML file's path or a name.

    A file holds either a whole `Cluster` (what `plait hardware probe -o` writes) or the short form::

        name: lab
        groups:
          - {part: A100-SXM-80GB, count: 16, usd_per_hour: 1.9}
        links:
          - {level: node, size: 8, bandwidth_gbs: 300, latency_us: 6}
          - {level: site, size: 16, bandwidth_gbs: 25, latency_us: 8}

    Raises:
        HardwareError: the file is missing, cyclic, unreadable or has a wrong field, or the name is unknown.
    """
    path = Path(text)
    if path.suffix not in (".yaml", ".yml", ".json") and not path.is_file():
        return named_cluster(text)
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if _is_cyclic(data, set(), set()):
            raise HardwareError(f"cluster file {path}: an anchor refers to itself", hint="write the group out")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as problem:
        raise HardwareError(f"cluster file {path}: {str(problem).splitlines()[0]}") from None
    if isinstance(data, dict) and isinstance(data.get("cluster"), dict):
        data = data["cluster"]
    if not isinstance(data, dict):
        raise HardwareError(f"cluster file {path}: a mapping is needed", hint="docs/hardware.md shows one")
    try:
        return Cluster.from_dict(_long_form(data))
    except (ValueError, TypeError) as problem:
        raise HardwareError(f"cluster file {path}: {problem}", hint="docs/hardware.md shows one") from None
    except HardwareError as problem:
        raise HardwareError(f"cluster file {path}: {problem.message}", hint=problem.hint) from None


def _is_cyclic(data: Any, above: set[int], done: set[int]) -> bool:
    """Whether a value holds itself; what is shared (an anchor used often) is looked at once."""
    if id(data) in done:
        return False
    if id(data) in above:
        return True
    above.add(id(data))
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    found = any(_is_cyclic(child, above, done) for child in children if isinstance(child, dict | list))
    above.discard(id(data))
    done.add(id(data))
    return found


def _long_form(data: dict[str, Any]) -> dict[str, Any]:
    """The mapping with short groups (`part`) and links (`bandwidth_gbs`, `latency_us`) written out."""
    for name in ("groups", "links"):
        if not isinstance(data.get(name) or [], list):
            raise ValueError(f"{name}: a list is needed, got {reprlib.repr(data[name])}")
    groups = []
    for group in data.get("groups") or ():
        if isinstance(group, dict) and isinstance(group.get("price_as_of"), datetime.date):
            group["price_as_of"] = group["price_as_of"].isoformat()  # what YAML makes of 2026-11-24 without quotes
        if isinstance(group, dict) and "part" in group:
            rest = {key: value for key, value in group.items() if key != "part"}
            part = find(str(group["part"]))
            offer = cheapest(part.name)
            if offer and "usd_per_hour" not in rest:
                rest |= {
                    "usd_per_hour": offer.price(),
                    "price_as_of": offer.as_of,
                    "price_source": f"{offer.cloud} {offer.instance_type} {offer.region}",
                }
            groups.append({"device": part.device.to_dict(), **rest})
        else:
            groups.append(group)
    links = []
    for given in data.get("links") or ():
        link = dict(given) if isinstance(given, dict) else given
        if isinstance(link, dict):
            for short, long, scale in (("bandwidth_gbs", "bandwidth", GB), ("latency_us", "latency", 1e-6)):
                if short in link:
                    value = link.pop(short)
                    if isinstance(value, bool) or not isinstance(value, int | float):
                        raise HardwareError(f"links: {short}={value!r} is not a number")
                    link[long] = value * scale
        links.append(link)
    return {**data, "groups": groups, "links": links}
