"""Fits the parameters of `plait/cost/data/serving.json` to the rows of served_figures.csv that are marked `fitted`.

    python benchmarks/fit_serving.py            # prints the errors before and after, writes the parameters

Least squares of log(predicted / published); every parameter stays within bounds that physics sets. Rows that are not
marked are never looked at here.
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from plait.cost import serving
from plait.cost.served_figures import load_figures, predict

FILE = Path(serving.__file__).parent / "data" / "serving.json"
# (section, name within it or '', parameter, low, high)
FREE = [
    ("defaults", "", "memory", 0.7, 0.95),
    ("defaults", "", "cache", 0.6, 1.1),
    ("defaults", "", "traffic", 0.0, 1.0),
    ("defaults", "", "attention", 0.2, 1.0),
    ("defaults", "", "kernel", 1e-6, 2e-5),
    ("families", "Hopper", "matmul_low", 0.3, 0.9),
    ("families", "Ampere", "matmul", 0.4, 0.9),
    ("families", "Ada", "matmul_low", 0.3, 0.9),
    ("families", "Turing", "matmul", 0.2, 0.9),
    ("families", "CDNA 3", "matmul_low", 0.05, 0.9),
    ("families", "Inferentia", "matmul", 0.1, 0.9),
    ("software", "tensorrt-llm-static", "kernel", 1e-6, 2e-5),
    ("software", "tensorrt-llm", "step", 0.0, 0.01),
    ("software", "vllm", "step", 0.0, 0.03),
    ("software", "fastertransformer", "scale", 0.2, 1.0),
    ("software", "fastertransformer", "kernel", 1e-6, 5e-5),
]  # fmt: skip


def place(data: dict, values: np.ndarray) -> None:
    """Writes `values` of FREE into `data`."""
    for (section, name, parameter, low, high), x in zip(FREE, values, strict=True):
        target = data[section].setdefault(name, {}) if name else data[section]
        target[parameter] = float(low + (high - low) / (1 + math.exp(-x)))


def main() -> None:
    """Fits and writes."""
    data = serving._data()
    figures = [f for f in load_figures() if f.fitted]
    start = []
    for section, name, parameter, low, high in FREE:
        target = data[section].setdefault(name, {}) if name else data[section]
        share = min(0.98, max(0.02, (target.get(parameter, data["defaults"][parameter]) - low) / (high - low)))
        start.append(math.log(share / (1 - share)))

    def residuals(values: np.ndarray) -> np.ndarray:
        place(data, values)
        errors = [math.log(predict(f)[0] / f.value) for f in figures]
        return np.array([*errors, *(0.02 * (values - start))])  # what no row decides stays where it was

    found = least_squares(residuals, start, loss="soft_l1", f_scale=0.2)
    place(data, found.x)
    for section in ("defaults", "families", "software", "categories"):
        for key, value in data[section].items():
            if isinstance(value, dict):
                data[section][key] = {k: float(f"{v:.4g}") for k, v in value.items()}
            else:
                data[section][key] = float(f"{value:.4g}")
    data["provenance"] = {
        "fit": f"benchmarks/fit_serving.py, {datetime.datetime.now(datetime.UTC).date()}, {len(figures)} rows marked `fitted` in served_figures.csv",
        "fitted": "; ".join(" ".join(filter(None, row[:3])) for row in FREE),
        "fusion, link, collective": "general knowledge: fused kernels move half of eager's bytes, links reach 60 %, 8 us for a small all-reduce",
        "tpu latency": "about 1 us a hop of ICI: github:jax-ml/scaling-book, sharding.md",
    }
    FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
