"""`plait hardware list | show | probe | refresh`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.options import Json
from plait.cli.output import only_result_on_stdout, show

__all__ = ["app"]

app = typer.Typer(help="Accelerators, offers and this computer.", no_args_is_help=True)


@app.command("list")
def list_parts(
    word: Annotated[str, typer.Argument(help="Only names that contain this.", show_default=False)] = "",
    trains: Annotated[bool, typer.Option("--trains", help="Only parts that can train.")] = False,
    json: Json = False,
) -> int:
    """The accelerators that plait knows."""
    from plait.hardware.catalogue import load_accelerators
    from plait.hardware.offers import cheapest

    parts = []
    for part in load_accelerators().values():
        device = part.device
        if word.lower() not in " ".join((part.name, *part.aliases)).lower() or (trains and not device.trains):
            continue
        offer = cheapest(part.name)
        price = None if offer is None else offer.price()
        parts.append({**part.to_dict(), "cheapest_usd_per_hour": price, "price_as_of": offer.as_of if offer else None})
    show({"accelerators": parts}, json, _list_text)
    return 0


def _tera(peaks: Mapping[str, float], name: str) -> str:
    return f"{peaks[name] / 1e12:,.0f}" if name in peaks else ""


def _list_text(result: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("name", "kind", "bf16 TFLOP/s", "fp8", "GiB", "GB/s", "link GB/s", "W", "$/h", "checked"):
        table.add_column(title, justify="left" if title in ("name", "kind", "checked") else "right")
    for part in result["accelerators"]:
        d = part["device"]
        memory, bandwidth, link, price = (
            d["memory_bytes"], d["memory_bandwidth"], part["link_bandwidth"], part["cheapest_usd_per_hour"],
        )  # fmt: skip
        table.add_row(
            part["device"]["name"],
            f"{d['category']}, {d['programmability']}" + ("" if d["trains"] else ", inference only"),
            _tera(d["peak_flops"], "bf16") or _tera(d["peak_flops"], "fp16"),
            _tera(d["peak_flops"], "fp8"),
            f"{memory / 2**30:.0f}" if memory else "",
            f"{bandwidth / 1e9:,.0f}" if bandwidth else "",
            f"{link / 1e9:.0f}" if link else "",
            f"{d['power_w']:.0f}" if d["power_w"] else "",
            f"{price:.2f}" if price else "",
            "yes" if d["verified"] else "no",
        )
    Console(width=None if sys.stdout.isatty() else 160, emoji=False).print(table)


@app.command("show")
def show_part(
    name: Annotated[str, typer.Argument(help="A part's name or alias, or COUNTxPART.")], json: Json = False
) -> int:
    """One part with its sources and offers, or a cluster with its links."""
    from plait.errors import HardwareError
    from plait.hardware.catalogue import find
    from plait.hardware.clusters import load_cluster
    from plait.hardware.offers import load_offers

    try:
        part = find(name)
    except HardwareError:
        if "x" not in name.lower() and not Path(name).is_file():
            raise
        try:
            cluster = load_cluster(name)
        except HardwareError as problem:
            if "neither a file nor COUNTxPART" in problem.message:
                find(name)
            raise
        show({"cluster": cluster.to_dict()}, json, _yaml_text)
        return 0
    offers = [o.to_dict() for o in load_offers() if o.accelerator == part.name]
    show({"accelerator": part.to_dict(), "offers": offers}, json, _yaml_text)
    return 0


def _yaml_text(result: Mapping[str, Any]) -> None:
    import yaml

    typer.echo(yaml.safe_dump(dict(result), sort_keys=False, allow_unicode=True).rstrip())


@app.command("probe")
def probe(
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN_DIR", help="Further runs for --calibrate.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="cluster.yaml", help="Write a cluster file.", show_default=False),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option("--devices", min=1, help="Processes in that cluster; default: cores.", show_default=False),
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibrate", metavar="RUN_DIR", help="Correct the cluster by what runs measured.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Measure this computer: matrix multiply, memory, collectives, threads. Takes about a minute."""
    from plait.errors import HardwareError
    from plait.hardware.calibrate import calibrated, read_runs
    from plait.hardware.local import cluster_of
    from plait.hardware.probe import load_probe, probe_machine, save_probe
    from plait.schema import Cluster

    if more and not calibrate:
        raise HardwareError(f"hardware probe takes no argument {str(more[0])!r}", hint="write --calibrate RUN_DIR...")
    calibrate = [*(calibrate or ()), *(more or ())]
    changes: dict[str, Any] = {}
    with only_result_on_stdout(json):
        measured = load_probe() if calibrate else None
        runs = read_runs(calibrate) if calibrate else []
        if measured is None:
            measured = probe_machine(say=lambda line: print(f"  {line}", file=sys.stderr, flush=True))
            save_probe(measured)
        count = devices or (runs[0].cluster.devices if runs else measured.cores)
        cluster = (
            Cluster.load(str(output)) if calibrate and output and output.is_file() else cluster_of(measured, count)
        )
        if calibrate:
            cluster, changes = calibrated(cluster, runs)
            if output is None:  # `train --plan auto` and `Nxcpu` use the kept probe
                save_probe(replace(measured, factors={name: changes[name] for name in ("scale", "node")}))
        if output is not None:
            _write(output, cluster)
    result = {"probe": measured.to_dict(), "cluster": cluster.to_dict(), "calibration": changes}
    show(result, json, _probe_text)
    if output is not None and not json:
        typer.echo(f"written to {output}")
    return 0


def _write(path: Path, cluster: Any) -> None:
    import yaml

    from plait.errors import HardwareError

    try:
        path.write_text(yaml.safe_dump(cluster.to_dict(), sort_keys=False), encoding="utf-8")
    except OSError as problem:
        raise HardwareError(f"cluster file {path}: {problem.strerror}") from None


def _probe_text(result: Mapping[str, Any]) -> None:
    measured = result["probe"]
    typer.echo(
        f"{measured['processor']}, {measured['cores']} cores, torch {measured['torch_version']}, {measured['seconds']:.0f} s"
    )
    for figure in measured["figures"]:
        typer.echo(
            f"  {figure['name']:<36} {figure['value']:>12.4g} {figure['unit']:<7} spread {100 * figure['spread']:.0f} %"
        )
    for note in measured["notes"]:
        typer.echo(f"  note: {note}")
    _calibration_text(result["calibration"])


def _calibration_text(changes: Mapping[str, float]) -> None:
    if changes:
        typer.echo(
            f"calibrated by {changes['runs']:.0f} runs: rates x {changes['scale']:.3f}, collectives x {changes['node']:.3f}\n"
            f"  mean error of their predicted step time: {changes['error_before_pct']:.1f} % before, "
            f"{changes['error_after_pct']:.1f} % after"
        )


@app.command("refresh")
def refresh(
    accelerators: Annotated[
        Path | None, typer.Option("--accelerators", metavar="CSV", help="A newer table of parts.", show_default=False)
    ] = None,
    offers: Annotated[
        Path | None, typer.Option("--offers", metavar="CSV", help="A newer table of offers.", show_default=False)
    ] = None,
    only_ages: Annotated[bool, typer.Option("--ages", help="Only say how old the present prices are.")] = False,
    json: Json = False,
) -> int:
    """Fetch today's prices (through gpuhunt), or take tables, check them, and use them from now on."""
    from plait.hardware.refresh import ages, install
    from plait.hardware.refresh import refresh as fetch_prices

    result: dict[str, Any] = {}
    with only_result_on_stdout(json):
        if accelerators is not None or offers is not None:
            install(accelerators=accelerators, offers=offers)
        elif not only_ages:
            result = fetch_prices()
    show({**result, **ages()}, json, _yaml_text)
    return 0
