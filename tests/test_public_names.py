"""The public API is one list."""

from __future__ import annotations

import importlib

import pytest

import plait

PUBLIC = [
    "Cluster",
    "Estimate",
    "Graph",
    "Job",
    "PlaitError",
    "Plan",
    "Program",
    "Run",
    "estimate",
    "export",
    "from_keras",
    "from_onnx",
    "launch",
    "parallelize",
    "search",
    "spawn",
    "start",
    "trace",
    "verify",
]


def test_the_list_is_what_the_package_exports():
    """`plait.__all__` is this very list, and dir() shows it."""
    assert sorted(plait.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(plait))


@pytest.mark.parametrize("name", plait.__all__)
def test_every_name_is_there(name: str):
    """Each public name can be had, and is what its own module has under that name."""
    value = getattr(plait, name)

    assert value is getattr(importlib.import_module(value.__module__), name)


def test_an_unknown_name_is_an_attribute_error():
    """A name that is not there fails as it does in any module."""
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        plait.trian  # noqa: B018
