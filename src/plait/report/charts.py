"""Charts as SVG text (matplotlib): each in a wide and a narrow form, the page shows the one that fits."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from plait.errors import RequestError
from plait.report.sources import PARTS, Report, Work
from plait.units import format_bytes, format_seconds

__all__ = ["Chart", "charts"]

_COLOURS = ("#2f6db5", "#e08a2c", "#3d9a57", "#c8503c", "#8465b3", "#8a6d5c", "#7a8490", "#b9a52f")
_KIND = {"forward": _COLOURS[0], "backward": _COLOURS[1], "weight": _COLOURS[2], "communication": _COLOURS[6],
         "optimizer": _COLOURS[4]}  # fmt: skip
_POINTS = 1500
"""Of a curve: more than a screen has columns."""
_RANKS = 64
"""Bars and rows of a chart."""
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, and it can be searched
    "svg.hashsalt": "plait",
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a0",
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

Chart = tuple[str, str, str, str]
"""(heading, caption, wide SVG, narrow SVG)."""


def charts(report: Report) -> list[Chart]:
    """Those for which the report has figures.

    Raises:
        RequestError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise RequestError(
            "report: the charts need matplotlib, which is not installed here", hint="pip install 'plait[report]'"
        ) from None
    wanted: list[tuple[bool, str, str, Callable[[Any, Report], None], float]] = [
        (bool(report.losses), "Loss", _loss_caption(report), _loss, 3.0),
        (len(report.speeds) > 1, "Speed", "Of every step, the first ones warming up.", _speed, 2.4),
        (_has_parts(report), "Where a step's time goes", _parts_caption(report), _parts, 2.2),
        (bool(report.memory or report.memory_measured), "Memory", _memory_caption(report), _memory,
         1.4 + 0.32 * min(_RANKS, max(len(report.memory), len(report.memory_measured)))),
        (bool(report.timeline), "The schedule", _timeline_caption(report), _timeline,
         1.2 + 0.34 * min(_RANKS, 1 + max((w.rank for w in report.timeline), default=0))),
        (len(report.alternatives) > 1, "Plans", "Step time and memory of the plan and of those behind it.", _plans, 3.0),
    ]  # fmt: skip
    with mpl.rc_context(cast(Any, _SETTINGS)):
        return [
            (title, caption, _svg(draw, report, 9.0, height), _svg(draw, report, 4.3, height + 0.5))
            for show, title, caption, draw, height in wanted
            if show
        ]


def _svg(draw: Callable[[Any, Report], None], report: Report, width: float, height: float) -> str:
    """The drawing as SVG for a page: no XML head, no metadata, nothing that names another place."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.add_subplot(), report)
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = sink.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    # Two drawings of a page must not share names.
    tag = f"{draw.__name__.strip('_')}{width:.0f}-"
    text = re.sub(r'id="([^"]+)"', rf'id="{tag}\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{tag}", text)
    return re.sub(
        r'(<svg[^>]*?) (width|height)="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) (width|height)="[^"]*"', r"\1", text)
    )


# -- a run's curves


def _loss_caption(report: Report) -> str:
    first, last = report.losses[0] if report.losses else (0, 0.0), report.losses[-1] if report.losses else (0, 0.0)
    return f"From {first[1]:.4g} at step {first[0]} to {last[1]:.4g} at step {last[0]}."


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    every = max(1, len(points) // _POINTS)
    kept = [*points[::every], points[-1]]
    return [step for step, _ in kept], [value for _, value in kept]


def _loss(axes: Any, report: Report) -> None:
    axes.plot(*_thinned(report.losses), color=_COLOURS[0], linewidth=1.3, label="training")
    if report.evaluations:
        axes.plot(*_thinned(report.evaluations), "o", color=_COLOURS[1], markersize=4.5, label="evaluation")
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="loss")
    _whole_steps(axes)


def _speed(axes: Any, report: Report) -> None:
    axes.plot(*_thinned(report.speeds), color=_COLOURS[2], linewidth=1.1)
    axes.set(xlabel="step", ylabel="per second", ylim=(0, None))
    _whole_steps(axes)


def _whole_steps(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


# -- a step's parts


def _sides(report: Report) -> list[tuple[str, Mapping[str, float]]]:
    both = (("predicted", report.predicted), ("measured", report.measured))
    return [(name, values) for name, values in both if any(values.get(part) for part in PARTS)]


def _has_parts(report: Report) -> bool:
    return bool(_sides(report))


def _parts_caption(report: Report) -> str:
    predicted, measured = report.predicted.get("step_time_s"), report.measured.get("step_time_s")
    if predicted and measured:
        error = 100 * (predicted / measured - 1)
        return f"Predicted {format_seconds(predicted)}, measured {format_seconds(measured)} ({error:+.0f} %); slowest rank."
    one = predicted or measured
    return f"{format_seconds(one)} {'predicted' if predicted else 'measured'}; slowest rank." if one else ""


def _parts(axes: Any, report: Report) -> None:
    sides = _sides(report)
    unit, scale = ("ms", 1e3) if max(sum(v.get(p, 0.0) for p in PARTS) for _, v in sides) < 10 else ("s", 1.0)
    left = [0.0] * len(sides)
    for part, colour in zip(PARTS, _COLOURS, strict=False):
        widths = [scale * max(0.0, values.get(part, 0.0)) for _, values in sides]
        if any(widths):
            label = part.replace("communication_exposed", "communication").replace("_", " ")
            axes.barh([name for name, _ in sides], widths, left=left, color=colour, label=label, height=0.6)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} a step")
    axes.grid(axis="y", visible=False)
    _legend_above(axes)


def _legend_above(axes: Any) -> None:
    count = len(axes.get_legend_handles_labels()[0])
    columns = count if axes.figure.get_figwidth() > 6 else 2
    axes.legend(
        frameon=False, ncols=max(1, columns), loc="lower left", bbox_to_anchor=(0, 1), fontsize=9, handlelength=1.2,
        columnspacing=1.2, borderaxespad=0.3,
    )  # fmt: skip


# -- memory


def _memory_caption(report: Report) -> str:
    said = []
    if report.memory:
        said.append(f"Predicted peak {format_bytes(max(sum(parts.values()) for parts in report.memory))}")
    if report.memory_measured:
        said.append(f"{'measured' if said else 'Measured'} {format_bytes(max(report.memory_measured))} in tensors")
    if report.memory_limit:
        said.append(f"{format_bytes(report.memory_limit)} may be used")
    shown = max(len(report.memory), len(report.memory_measured))
    return "; ".join(said) + "." + (f" The first {_RANKS} of {shown} ranks are shown." if shown > _RANKS else "")


def _memory(axes: Any, report: Report) -> None:
    peak = max(
        [*(sum(parts.values()) for parts in report.memory), *report.memory_measured, 1.0],
    )
    unit, scale = ("GiB", 2**30) if peak >= 2**30 else ("MiB", 2**20)
    stages = report.memory[:_RANKS]
    left = [0.0] * len(stages)
    rows = [float(i) for i in range(len(stages))]
    for number, part in enumerate(dict.fromkeys(name for parts in stages for name in parts)):
        widths = [parts.get(part, 0.0) / scale for parts in stages]
        if any(widths):
            axes.barh(rows, widths, left=left, color=_COLOURS[number], label=part, height=0.62)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    labels = [f"pipeline rank {i}" for i in range(len(stages))]
    if report.memory_measured:
        ranks = report.memory_measured[:_RANKS]
        if stages:
            labels = [f"predicted, pp {i}" for i in range(len(stages))]
        places = [len(stages) + 0.25 + i for i in range(len(ranks))]
        axes.barh(
            places, [value / scale for value in ranks], color="#b7c0ca", height=0.62, label="measured, in tensors"
        )
        rows, labels = [*rows, *places], [*labels, *(f"measured, rank {i}" for i in range(len(ranks)))]
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(axis="y", visible=False)
    _legend_above(axes)


# -- the schedule


def _timeline_caption(report: Report) -> str:
    spans = len(report.timeline)
    return f"Simulated: the first {spans} pieces of work, microbatches by number; gaps are the bubble."


def _timeline(axes: Any, report: Report) -> None:
    from matplotlib.patches import Patch

    ranks = min(_RANKS, 1 + max(work.rank for work in report.timeline))
    by_kind: dict[str, list[Work]] = {}
    for work in report.timeline:
        if work.rank < ranks:
            by_kind.setdefault(work.kind, []).append(work)
    end = max(work.end for work in report.timeline)
    unit, scale = ("ms", 1e3) if end < 10 else ("s", 1.0)
    narrowest = end * scale / (60 if axes.figure.get_figwidth() > 6 else 28)  # a number of two digits fits in this
    for kind, works in by_kind.items():
        for work in works:
            width = scale * (work.end - work.start)
            axes.broken_barh([(scale * work.start, width)], (work.rank - 0.4, 0.8), facecolor=_KIND.get(kind, _COLOURS[7]),
                             edgecolor="white", linewidth=0.5)  # fmt: skip
            if width > narrowest and kind in ("forward", "backward", "weight"):
                axes.text(scale * work.start + width / 2, work.rank, str(work.microbatch), ha="center", va="center",
                          fontsize=8, color="white")  # fmt: skip
    axes.set_yticks(range(ranks), [f"rank {i}" for i in range(ranks)])
    axes.set(xlabel=unit, xlim=(0, end * scale), ylim=(ranks - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    handles = [Patch(color=_KIND.get(kind, _COLOURS[7]), label=kind or "other") for kind in by_kind]
    axes.legend(handles=handles, frameon=False, ncols=len(handles) if axes.figure.get_figwidth() > 6 else 2,
                loc="lower left", bbox_to_anchor=(0, 1), fontsize=9, handlelength=1.2, borderaxespad=0.3)  # fmt: skip


# -- other plans


def _plans(axes: Any, report: Report) -> None:
    front = sorted(_points_of(report.pareto))
    if len(front) > 1:
        xs, ys = zip(*front, strict=True)
        axes.plot(xs, ys, ".-", color=_COLOURS[1], linewidth=1.2, label="Pareto front")
        axes.legend(frameon=False)
    for number, (x, y) in enumerate(_points_of(report.alternatives), 1):
        axes.plot([x], [y], "o", color=_COLOURS[0] if number == 1 else _COLOURS[6], markersize=8 if number == 1 else 6)
        axes.annotate(str(number), (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.set(xlabel="GiB on the fullest device", ylabel="ms a step")
    axes.margins(0.12, 0.18)


def _points_of(rows: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """(GiB, ms)."""
    return [(row["peak_memory_gib"], 1e3 * row["step_time_s"]) for row in rows]
