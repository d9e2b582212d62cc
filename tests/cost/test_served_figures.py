"""Published throughput and latency figures: how far the serving cost model is off, fitted rows and others apart."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from plait.cost.served_figures import load_figures, median_error, predict
from plait.errors import TableError

FIGURES = load_figures()
LEFT_OUT = [f for f in FIGURES if not f.fitted]
FITTED = [f for f in FIGURES if f.fitted]


def test_there_are_enough_figures_with_sources():
    """At least ten that no parameter was fitted to, of several makers, models and engines, each with its source."""
    assert len(LEFT_OUT) >= 10
    assert all(f.source.startswith(("github:", "https://", "arXiv ")) for f in FIGURES)
    assert len({f.accelerator for f in FIGURES}) >= 7
    assert len({f.model for f in LEFT_OUT}) >= 8


def test_median_error_of_figures_left_out():
    """Below a fifth, and what docs/advise.md states is what comes out."""
    found = median_error(LEFT_OUT)
    page = (Path(__file__).parents[2] / "docs" / "advise.md").read_text(encoding="utf-8")
    stated = re.search(r"(\d+) figures left out: median error ([\d.]+) %", page)

    assert found < 20
    assert stated is not None
    assert int(stated[1]) == len(LEFT_OUT)
    assert float(stated[2]) == pytest.approx(found, abs=0.1)


def test_figures_left_out_are_not_much_worse_than_fitted_ones():
    """A model that only remembers its rows would be."""
    within = [abs(predict(f)[0] / f.value - 1) <= 0.25 for f in LEFT_OUT]

    assert statistics.mean(within) >= 0.8
    assert median_error(FITTED) < 10


def test_a_broken_table_is_refused(tmp_path):
    """A metric that does not exist, with its line."""
    file = tmp_path / "figures.csv"
    text = (
        (Path(__file__).parents[2] / "src/plait/cost/data/served_figures.csv").read_text(encoding="utf-8").splitlines()
    )
    file.write_text("\n".join([text[0], text[1].replace("output_tokens_per_s_per_device", "words")]), encoding="utf-8")
    with pytest.raises(TableError, match="line 2: metric='words'"):
        load_figures(file)
    file.write_text("\n".join([text[0], text[1].replace("26150", "many")]), encoding="utf-8")
    with pytest.raises(TableError, match="line 2"):
        load_figures(file)
    with pytest.raises(TableError, match="no figures"):
        median_error([])
