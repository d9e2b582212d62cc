"""Published serving figures against the serving cost model: `python -m plait.cost.served_figures`.

`data/served_figures.csv` has the figures with their sources, `data/served_models.json` the models. Rows marked `fitted`
were used for parameters of `data/serving.json` (benchmarks/fit_serving.py); the others were left out, and their error is
what a reader should expect.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.cost.architecture import Architecture, build_graph
from plait.cost.serving import Load, ServingEstimate, ServingPlan, estimate_serving
from plait.cost.serving_work import Served, served_work
from plait.errors import TableError
from plait.hardware.catalogue import find
from plait.hardware.clusters import uniform_cluster
from plait.hardware.tables import rows
from plait.schema.cluster import Cluster

__all__ = ["Figure", "load_figures", "median_error", "predict", "served_model"]

_DATA = Path(__file__).parent / "data"
_COLUMNS = (  # noqa: SIM905 - one line a person can compare with the header
    "model,accelerator,devices,precision,cache_precision,tp,pp,batch,input_tokens,output_tokens,metric,value,software,"
    "fitted,source"
).split(",")
_METRICS = (
    "output_tokens_per_s",
    "output_tokens_per_s_per_device",
    "first_token_ms",
    "output_token_ms",
    "request_s",
    "batch_ms",
    "samples_per_s",
)
# Sequences that an engine takes at once under maximum load: TensorRT-LLM's default max_batch_size.
_MAXIMUM = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One published figure."""

    model: str
    accelerator: str
    devices: int
    plan: ServingPlan
    load: Load
    full: bool
    """No batch is stated: the engine is as full as memory allows."""
    metric: str
    value: float
    software: str
    fitted: bool
    source: str


@functools.cache
def load_figures(path: Path = _DATA / "served_figures.csv") -> tuple[Figure, ...]:
    """All figures, checked.

    Raises:
        TableError: a metric is not known, or a number is none.
    """
    found = []
    for where, c in rows(path, _COLUMNS):
        if c["metric"] not in _METRICS:
            raise TableError(f"{where}: metric={c['metric']!r} is not one of {', '.join(_METRICS)}")
        try:
            plan = ServingPlan(
                tp=int(c["tp"]),
                pp=int(c["pp"]),
                precision=c["precision"],
                cache_precision=c["cache_precision"],
                batch=int(c["batch"] or 1),
            )
            load = Load(input_tokens=int(c["input_tokens"] or 0), output_tokens=int(c["output_tokens"] or 0))
            value, devices = float(c["value"]), int(c["devices"])
        except ValueError as problem:
            raise TableError(f"{where}: {problem}") from None
        found.append(
            Figure(
                model=c["model"],
                accelerator=c["accelerator"],
                devices=devices,
                plan=plan,
                load=load,
                full=not c["batch"],
                metric=c["metric"],
                value=value,
                software=c["software"],
                fitted=c["fitted"] == "yes",
                source=c["source"],
            )
        )
    return tuple(found)


@functools.cache
def served_model(name: str) -> Served:
    """The work of the model called `name` in served_models.json."""
    data = json.loads((_DATA / "served_models.json").read_text(encoding="utf-8"))
    if name not in data:
        raise TableError(f"served_figures.csv: model {name!r} is not in served_models.json")
    return served_work(build_graph(Architecture(name=name, **data[name])))


@functools.cache
def _cluster(accelerator: str, devices: int) -> Cluster:
    return uniform_cluster(find(accelerator), devices, name=f"{devices}x{accelerator}")


def predict(figure: Figure) -> tuple[float, ServingEstimate]:
    """The predicted value in the figure's unit, and the estimate behind it."""
    work, cluster = served_model(figure.model), _cluster(figure.accelerator, figure.devices)
    batch = figure.plan.batch
    if figure.full:
        batch = min(_MAXIMUM, max(1, estimate_serving(work, cluster, figure.plan, figure.load).largest_batch))
    found = estimate_serving(work, cluster, figure.plan, figure.load, software=figure.software, batch=batch)
    value = {
        "output_tokens_per_s": found.throughput,
        "output_tokens_per_s_per_device": found.throughput / figure.devices,
        "first_token_ms": found.first_token * 1e3,
        "output_token_ms": found.decode * 1e3,
        "request_s": found.request,
        "batch_ms": found.latency * 1e3,
        "samples_per_s": found.throughput,
    }[figure.metric]
    return value, found


def median_error(figures: Iterable[Figure]) -> float:
    """Median of |predicted / published - 1|, in percent.

    Raises:
        TableError: there are no figures.
    """
    errors = [abs(predict(f)[0] / f.value - 1) for f in figures]
    if not errors:
        raise TableError("there are no figures to compare with")
    return 100 * statistics.median(errors)


def _table(figures: Sequence[Figure]) -> Iterator[str]:
    """Lines with every figure beside its prediction, and the medians."""
    for f in figures:
        value, found = predict(f)
        shape = f"{f.load.input_tokens}/{f.load.output_tokens}"
        batch = f"{found.largest_batch}*" if f.full else f"{f.plan.batch}"
        yield (
            f"{f.model:16} {f.devices:3}x{f.accelerator:14} {f.plan.precision:5} {shape:>10} batch {batch:>6} "
            f"{f.metric:31} {f.value:10,.1f} {value:10,.1f} {100 * (value / f.value - 1):+6.0f} % {'fitted' if f.fitted else ''}"
        )
    for name, some in (
        ("fitted", [f for f in figures if f.fitted]),
        ("left out", [f for f in figures if not f.fitted]),
    ):
        if some:
            within = sum(abs(predict(f)[0] / f.value - 1) <= 0.25 for f in some)
            yield (f"{name}: {len(some)} figures, median error {median_error(some):.1f} %, {within} within 25 %")
    yield (f"all: {len(figures)} figures, median error {median_error(figures):.1f} %")


if __name__ == "__main__":
    sys.stdout.write("\n".join(_table(load_figures())) + "\n")
