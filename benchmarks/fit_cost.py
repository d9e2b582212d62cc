"""Fits the cost model's parameters to published measurements and writes src/plait/cost/data/calibration.json.

    python benchmarks/fit_cost.py TABLE.csv [--write] [--left-out] [--rows 60]

Every parameter belongs to an accelerator family, a link, a generation of software or a code base, and starts from a
prior (general knowledge, stated below) that it is pulled towards: a code base's own deviations most strongly. Groups
(source, accelerator) weigh the same however many rows they have. `--left-out` fits once more without each source and
predicts it so, which is the primary figure.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import random
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from plait.cost.architecture import build_graph
from plait.cost.calibration import DATA, Calibration, load_calibration
from plait.cost.case import SkipRow, case_of
from plait.cost.model import Cache
from plait.cost.partition import default_cuts
from plait.cost.step import estimate
from plait.cost.table import read_table
from plait.cost.validate import _measured, predict_case, validate
from plait.errors import PlaitError

# (where, name): (prior, spread of its logarithm or logit, how it is transformed)
PRIORS: dict[tuple[str, str], tuple[float, float, str]] = {
    ("defaults", "traffic"): (0.3, 0.6, "log"),
    ("defaults", "memory"): (0.8, 0.5, "logit"),
    ("defaults", "kernel"): (2e-6, 0.7, "log"),
    ("defaults", "step"): (2e-3, 1.0, "log"),
    ("defaults", "slowdown"): (0.1, 0.8, "log"),
    ("defaults", "spread"): (0.005, 0.8, "log"),
    ("defaults", "optimizer"): (0.7, 0.8, "logit"),
    ("defaults", "grouped"): (0.8, 0.8, "logit"),
    ("defaults", "low_bytes"): (0.3, 0.7, "log"),
    ("links", "NVLink"): (0.75, 0.8, "logit"),
    ("links", "InfiniBand"): (0.7, 0.8, "logit"),
    ("links", "as stated"): (0.7, 0.8, "logit"),
    ("links", "ICI"): (0.7, 0.8, "logit"),
    ("links", "data-centre"): (0.7, 0.8, "logit"),
    ("links", "Infinity"): (0.5, 0.8, "logit"),
    ("latency", "NVLink"): (1.5, 0.8, "log"),
    ("latency", "InfiniBand"): (1.5, 0.8, "log"),
    ("latency", "as stated"): (1.5, 0.8, "log"),
    ("latency", "ICI"): (1.0, 0.8, "log"),
    ("latency", "data-centre"): (1.0, 0.8, "log"),
}
for family, low in (("Volta", None), ("Ampere", None), ("Hopper", 0.6), ("Grace Blackwell", 0.6), ("CDNA 3", 0.4),
                    ("TPU", None), ("TPU Trillium", None)):  # fmt: skip
    PRIORS["families", f"{family}/matmul"] = ({"CDNA 3": 0.5}.get(family, 0.72), 0.6, "logit")
    if low:
        PRIORS["families", f"{family}/matmul_low"] = (low, 0.6, "logit")
for generation in ("eager", "unfused", "transformer-engine", "compiled", "xla"):
    PRIORS["generations", f"{generation}/fusion"] = ({"xla": 0.5, "compiled": 0.6, "transformer-engine": 0.7}.get(generation, 0.9), 0.3, "log")  # fmt: skip
    PRIORS["generations", f"{generation}/dp_overlap"] = (0.8, 1.0, "logit")
    if generation != "unfused":
        PRIORS["generations", f"{generation}/attention"] = (0.9, 0.3, "log")
        PRIORS["generations", f"{generation}/attention_back"] = (0.75, 0.3, "log")
    if generation != "xla":
        PRIORS["generations", f"{generation}/launch"] = (3e-5, 0.7, "log")
    if generation in ("eager", "unfused", "transformer-engine"):
        PRIORS["generations", f"{generation}/launch_collective"] = (3e-5, 0.8, "log")
        PRIORS["generations", f"{generation}/tp_overlap"] = (0.2, 1.0, "logit")
        PRIORS["generations", f"{generation}/pp_seconds"] = (1e-4, 1.0, "log")
PRIORS["generations", "transformer-engine/ep_overlap"] = (0.3, 1.0, "logit")
PRIORS["generations", "transformer-engine/pp_overlap"] = (0.5, 1.0, "logit")
for software in ("nanotron", "llm-foundry", "internevo", "megatron-unfused", "megatron-core"):
    PRIORS["software", f"{software}/scale"] = (1.0, 0.08, "log")
    PRIORS["software", f"{software}/messages"] = (1.0, 0.8, "log")
    PRIORS["software", f"{software}/spread"] = (0.005, 0.8, "log")
for software in ("nanotron", "megatron-unfused"):
    PRIORS["software", f"{software}/launch"] = (5e-5, 0.7, "log")
    PRIORS["software", f"{software}/launch_collective"] = (5e-5, 0.8, "log")
PRIORS["software", "nanotron/node_latency"] = (2.0, 1.0, "log")
PRIORS["software", "nanotron/tp_hop"] = (1e-4, 1.5, "log")
PRIORS["defaults", "tp_crossing"] = (0.5, 0.8, "logit")
PRIORS["software", "nanotron/stall"] = (2e-5, 2.0, "log")
PRIORS["software", "nanotron/pp_seconds"] = (1e-3, 1.5, "log")
KEYS = list(PRIORS)
SHARPNESS, WEIGHT = 0.07, 60.0  # a residual of 7 % counts in full, beyond it less; one group against the priors


def forward(value: float, kind: str) -> float:
    return math.log(value) if kind == "log" else math.log(value / (1 - value))


def backward(x: float, kind: str) -> float:
    return math.exp(x) if kind == "log" else 1 / (1 + math.exp(-x))


START = np.array([forward(PRIORS[k][0], PRIORS[k][2]) for k in KEYS])
SPREAD = np.array([PRIORS[k][1] for k in KEYS])


def calibration_of(x: np.ndarray, base: Calibration) -> Calibration:
    """`base` with the parameters of `x`."""
    data = json.loads(base.to_json())
    for key, value in zip(KEYS, x, strict=True):
        where, name = key
        number = backward(float(value), PRIORS[key][2])
        if where == "defaults":
            data["defaults"][name] = number
        elif where in ("links", "latency"):
            data["links"].setdefault(name, {})["efficiency" if where == "links" else "latency"] = number
        else:
            owner, parameter = name.rsplit("/", 1)
            if where == "software":
                item = next(s for s in data["software"] if s["name"] == owner)
                item["parameters"][parameter] = number
            else:
                data[where].setdefault(owner, {})[parameter] = number
    return Calibration.from_dict(data)


def rounded(data):
    """Numbers with four digits."""
    if isinstance(data, dict):
        return {key: rounded(item) for key, item in data.items()}
    if isinstance(data, list):
        return [rounded(item) for item in data]
    return float(f"{data:.4g}") if isinstance(data, float) else data


def load(path: Path, base: Calibration, most: int):
    """(key, graph, cache, case, seconds) of the rows that count, at most `most` a group."""
    groups = defaultdict(list)
    graphs = {}
    for row in read_table(path):
        if row.text("apart") and not row.text("apart").startswith("time only"):
            continue
        try:
            case = case_of(row, base)
        except SkipRow:
            continue
        if case.architecture not in graphs:
            graphs[case.architecture] = (build_graph(case.architecture), Cache())
        graph, cache = graphs[case.architecture]
        seconds = _measured(row, case, graph, [])
        if seconds is None:
            continue
        try:
            plan = predict_case(case, graph, cache, base).plan
        except PlaitError:
            continue
        if case.open_recompute:
            case = replace(case, plan=replace(case.plan, recompute=plan.recompute), open_recompute=False)
        if case.plan.stages > 1 and not case.plan.cuts:
            case = replace(case, plan=replace(case.plan, cuts=default_cuts(graph, case.plan.stages)))
        groups[row.group, row.text("accelerator")].append((graph, cache, case, seconds))
    random.seed(0)
    return {
        k: v
        if len(v) <= most * (3 if k[0] == "nanotron" else 1)
        else random.sample(v, most * (3 if k[0] == "nanotron" else 1))
        for k, v in groups.items()
    }


def residuals(x: np.ndarray, groups, base: Calibration) -> np.ndarray:
    calibration = calibration_of(x, base)
    software = {s.name: s for s in calibration.software}
    out = []
    for rows in groups.values():
        weight = math.sqrt(WEIGHT / len(rows))
        for graph, cache, case, seconds in rows:
            found = estimate(graph, case.cluster, case.plan, case.batch, software=software[case.software.name],
                             calibration=calibration, cache=cache)  # fmt: skip
            r = math.log(found.step_time_s / seconds) / SHARPNESS
            # Pseudo-Huber as a plain residual, so that priors stay quadratic.
            out.append(weight * math.copysign(math.sqrt(2 * (math.sqrt(1 + r * r) - 1)), r))
    return np.concatenate([np.array(out), (x - START) / SPREAD])


def fit(groups, base: Calibration, start: np.ndarray, steps: int) -> np.ndarray:
    """The parameters with the least cost; in units of their priors' spread, which scales them alike."""

    def value(z: np.ndarray) -> np.ndarray:
        return residuals(START + z * SPREAD, groups, base)

    def slope(z: np.ndarray) -> np.ndarray:
        here = value(z)
        columns = []
        for position in range(len(z)):
            moved = z.copy()
            moved[position] += 0.02
            columns.append((value(moved) - here) / 0.02)
        return np.stack(columns, axis=1)

    result = least_squares(value, (start - START) / SPREAD, jac=slope, method="trf", max_nfev=steps, ftol=1e-3)
    print(f"cost {result.cost:.1f} after {result.nfev} steps", file=sys.stderr, flush=True)
    return START + result.x * SPREAD


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("table", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--left-out", action="store_true")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--start", type=Path, help="values saved by an earlier run")
    parser.add_argument("--save", type=Path, default=Path("/tmp/fit_cost.json"))
    options = parser.parse_args()
    base = load_calibration()
    groups = load(options.table, base, options.rows)
    start = START.copy()
    if options.start:
        saved = json.loads(options.start.read_text(encoding="utf-8"))
        for position, key in enumerate(KEYS):
            kind = PRIORS[key][2]
            if (value := saved.get("/".join(key))) is not None:
                start[position] = forward(min(value, 0.97) if kind == "logit" else value, kind)
    x = fit(groups, base, start, options.steps) if options.steps else start
    values = {"/".join(k): backward(float(v), PRIORS[k][2]) for k, v in zip(KEYS, x, strict=True)}
    options.save.write_text(json.dumps(values, indent=1), encoding="utf-8")
    for key, value in zip(KEYS, x, strict=True):
        print(f"{key[0]:12} {key[1]:32} {PRIORS[key][0]:10.4g} -> {backward(float(value), PRIORS[key][2]):10.4g}")
    final = calibration_of(x, base)
    digest = hashlib.sha256(options.table.read_bytes()).hexdigest()[:12]
    provenance = {
        "script": "benchmarks/fit_cost.py",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "table": f"{options.table.name} sha256 {digest}",
        "rows": str(sum(len(rows) for rows in groups.values())),
        "left_out": base.provenance.get("left_out", "not measured"),
    }
    rows = read_table(options.table)
    print(json.dumps(validate(rows, final).summary()))
    if options.left_out:
        figures = left_out(groups, base, x, rows)
        provenance["left_out"] = json.dumps(figures)
    if options.write:
        final = replace(final, provenance=provenance)
        DATA.write_text(json.dumps(rounded(final.to_dict()), indent=1) + "\n", encoding="utf-8")


def left_out(groups, base: Calibration, x: np.ndarray, rows) -> dict[str, float]:
    """Median error of each group predicted by a fit without its source."""
    figures: dict[str, float] = {}
    families: dict[str, set[str]] = defaultdict(set)
    for (source, _), cases in groups.items():
        families[cases[0][2].cluster.groups[0].device.family].add(source)
    for source in sorted({s for s, _ in groups}):
        rest = {k: v for k, v in groups.items() if k[0] != source}
        # What only this source informs goes back to its prior.
        start = x.copy()
        mine = {case.software.name for (s, _), cases in groups.items() if s == source for *_, case, _ in cases}
        others = {case.software.name for cases in rest.values() for *_, case, _ in cases}
        for position, (where, name) in enumerate(KEYS):
            if where == "software" and name.split("/")[0] in mine - others:
                start[position] = START[position]
        found = calibration_of(fit(rest, base, start, 2), base)
        result = validate([row for row in rows if row.group == source], found)
        for group in result.groups():
            if group["median_error_pct"] is None:
                continue
            family = next(
                i.case.cluster.groups[0].device.family
                for i in result.rows
                if i.case and i.row.text("accelerator") == group["accelerator"]
            )
            alone = "alone: " if len(families[family]) == 1 else ""
            figures[f"{alone}{source} {group['accelerator']}"] = round(group["median_error_pct"], 2)
            print("left out", alone, source, group["accelerator"], round(group["median_error_pct"], 1), "bias", round(group["bias_pct"], 1), "n", group["count"], flush=True)  # fmt: skip
    shared = [v for k, v in figures.items() if not k.startswith("alone")]
    figures["mean"] = round(statistics.fmean(shared), 2)
    figures["mean with families of one source"] = round(
        statistics.fmean(v for k, v in figures.items() if k != "mean"), 2
    )
    print("left out mean", figures["mean"], "all", figures["mean with families of one source"])
    return figures


if __name__ == "__main__":
    main()
