"""Backends are found by entry points."""

from __future__ import annotations

import pytest

from plait.errors import ServeError
from plait.serve.backend import Backend
from plait.serve.registry import backend_at, backends, chosen


def test_plaits_own_are_there():
    """Each name of pyproject is a backend of that name, made without importing its runtime."""
    found = backends()

    assert {"torch", "aoti", "compile", "onnxruntime", "openvino", "executorch", "tensorrt", "neuron", "coreml"} <= set(
        found
    )
    for name, place in found.items():
        backend = backend_at(place)
        assert isinstance(backend, Backend)
        assert backend.name == name


def test_an_unknown_name_offers_the_nearest():
    """A typing error is answered with what was meant."""
    with pytest.raises(ServeError, match="no backend 'onnxrutime'; did you mean 'onnxruntime'") as caught:
        chosen("torch,onnxrutime")

    assert "openvino" in caught.value.hint
    assert caught.value.exit_status == 2


def test_somebody_elses_is_found(more_backends):
    """A package that names an entry point is one more word for --to."""
    assert chosen("program") == {"program": "more_backends:Program"}
    assert {"program", "torch"} <= set(chosen("all"))


def test_what_is_no_backend_is_refused():
    """An entry point has to lead to a subclass of Backend."""
    with pytest.raises(ServeError, match="not a subclass"):
        backend_at("pathlib:Path")
    with pytest.raises(ServeError, match="cannot be imported"):
        backend_at("plait.serve.backend:Nothing")


def test_what_raises_when_it_is_imported_or_made_stays_its_own(tmp_path, monkeypatch):
    """Somebody's package without its licence is one backend that is missing, not the end of the export."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "unlicensed.py").write_text("raise RuntimeError('no licence')")
    (tmp_path / "unmade.py").write_text(
        "from plait.serve.runtimes.torch_program import TorchProgram\n"
        "class Unmade(TorchProgram):\n    def __init__(self):\n        raise OSError('no device')\n"
    )
    with pytest.raises(ServeError, match=r"unlicensed:Any: it cannot be imported \(RuntimeError: no licence\)"):
        backend_at("unlicensed:Any")
    with pytest.raises(ServeError, match=r"unmade:Unmade: it cannot be made \(OSError: no device\)"):
        backend_at("unmade:Unmade")


def test_a_missing_package_names_the_extra(monkeypatch):
    """What is not installed is said with the command that installs it, and nothing is imported to find out."""
    from plait.serve.runtimes import openvino

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert openvino.OpenVino().missing() == "openvino not installed: pip install 'plait[openvino]'"
