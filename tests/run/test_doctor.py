"""What `plait doctor` finds, and that it finds defects where there are some."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch
from torch.distributed.pipelining import _backward

from plait.run import doctor


@pytest.fixture(scope="module")
def report():
    """One examination of this machine."""
    return doctor.examine()


@pytest.mark.multi
def test_this_machine_is_in_order(report):
    """Everything that plait needs works here."""
    broken = [check for check in report["checks"] if check["state"] == "broken"]

    assert report["ok"], broken
    assert report["versions"]["torch"] == torch.__version__


@pytest.mark.multi
def test_collectives_are_tried_by_two_processes(report):
    """The collectives a plan needs are there, each with its own line."""
    names = {check["name"] for check in report["checks"] if check["group"] == "collectives (gloo)"}

    assert {"all-reduce", "all-gather", "reduce-scatter", "send and receive", "pipeline"} <= names


def without(line: str, instead: str) -> ModuleType:
    """The split backward of torch as it was before a repair."""
    source = inspect.getsource(_backward)
    assert line in source
    module = ModuleType("old_backward")
    module.__package__ = _backward.__package__
    exec(compile(source.replace(line, instead), "old_backward", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    ("check", "line", "instead"),
    [
        (doctor._zero_bubble_reuse, 'if len(param_group["intermediates"]) > 1:', "if False:"),
        (doctor._zero_bubble_several, "valid_edges.append(GradientEdge(intermediate, i))",
         "valid_edges.append(GradientEdge(intermediate, 0))"),
    ],
    ids=["pytorch#180952", "pytorch#170277"],
)  # fmt: skip
def test_a_defect_of_an_older_torch_is_found(monkeypatch: pytest.MonkeyPatch, check, line: str, instead: str):
    """The reproduction fails on torch's code from before the repair, and passes on this one."""
    assert doctor._try("known defects", "x", check)["state"] == "ok"
    old = without(line, instead)
    monkeypatch.setattr(_backward, "stage_backward_weight", old.stage_backward_weight)

    found = doctor._try("known defects", "x", check)
    assert found["state"] == "broken"
    assert "the gradient of the weight is off by" in found["detail"]


def test_processes_that_die_are_a_broken_check_with_their_last_words():
    """A device that is not there breaks one check and takes nothing else along."""
    checks = doctor._pair("collectives (nosuch)", "nosuch", 1)

    assert checks[-1]["state"] == "broken"
    assert "accelerator" in checks[-1]["detail"]


def test_processes_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch):
    """A process that waits for one that never comes is ended at the time limit."""
    monkeypatch.setattr(doctor, "_PAIR_TIMEOUT", 0.2)
    checks = doctor._pair("collectives", "cpu", 2)

    assert checks[-1]["detail"] == "no answer from 2 processes within 0 s"
