"""A module to an entry point: names, open sizes, outputs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from small_models import Mlp, Tagger, tagger_batch
from torch import nn

from plait.errors import CaptureError
from plait.serve.entry import Flat, export_entry
from plait.serve.subject import Entry, TensorSpec, misfit


def test_names_and_open_sizes(tmp_path):
    """Inputs have the names of forward's parameters, outputs their keys; batch and length are open, None is left out."""
    entry, _ = export_entry(Tagger().eval(), tagger_batch(2), [0, 0], folder=tmp_path, most=8)

    assert entry.inputs[0] == TensorSpec("tokens", "int64", ("batch", "length"))
    assert [o.name for o in entry.outputs] == ["logits", "last_0", "last_1"]
    assert entry.outputs[0].shape == ("batch", "length", 5)
    assert entry.dims["batch"] == (1, 8)
    assert entry.dims["length"] == (1, 12)


def test_inputs_share_one_batch(tmp_path):
    """A mask that broadcasts has a symbol of its own in the graph, and the same batch in the entry point."""

    class Masked(nn.Module):
        def forward(self, x, mask):
            return x.relu() * mask[:, None, :1].expand(x.shape[0], 3, 1)

    entry, _ = export_entry(Masked().eval(), (torch.randn(2, 3, 5), torch.ones(2, 4)), [0, 0], folder=tmp_path, most=8)

    assert [spec.shape[0] for spec in entry.inputs] == ["batch", "batch"]
    assert entry.dims["batch"] == (1, 8)
    assert misfit(entry, [(2, 3, 5), (3, 3, 4)]) is not None


def test_a_size_that_the_model_fixes_is_a_number(tmp_path):
    """What forward compares with a number is closed by torch.export, and so in the entry point."""

    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, -1).sum(1)

    entry, _ = export_entry(Fixed().eval(), torch.randn(2, 6), [0], folder=tmp_path, most=8)

    assert entry.inputs[0].shape[1] == 6


def test_a_model_that_cannot_be_captured_names_the_users_line(tmp_path):
    """Python that branches on values is the user's to change."""

    class Branches(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(CaptureError, match=r"test_entry.py.*if x.sum\(\) > 0"):
        export_entry(Branches().eval(), torch.randn(2, 6), [0], folder=tmp_path, most=8)


def test_no_tensor_out_is_refused(tmp_path):
    """There must be something to serve."""

    class Nothing(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(CaptureError, match="returns no tensor"):
        export_entry(Nothing().eval(), torch.randn(2, 6), [0], folder=tmp_path, most=8)


def test_inputs_and_outputs_come_back():
    """Flattening keeps what is no tensor, and the way back gives what the module gives."""
    flat = Flat.of(Mlp(), {"x": torch.ones(2), "scale": 3, "nested": {"y": torch.zeros(1)}})

    assert flat.names == ["x", "nested_y"]
    assert flat.inputs([torch.zeros(2), torch.ones(1)])["scale"] == 3
    outputs = {"a": torch.ones(1), "b": None, "c": (torch.zeros(2), 5)}
    back = flat.unflatten_outputs(flat.flatten_outputs(outputs))
    assert back["b"] is None
    assert torch.equal(back["c"][0], torch.zeros(2))


def test_names_are_identifiers_and_differ():
    """Runtimes take names as they are in C."""

    class Odd(nn.Module):
        def forward(self, *args, **kwargs):
            return args

    assert Flat.of(Odd(), (torch.ones(1), torch.ones(1))).names == ["input_0", "input_1"]
    assert Flat.of(Odd(), {"a.b": torch.ones(1), "a_b": torch.ones(1), "class": torch.ones(1)}).names == [
        "a_b",
        "a_b_2",
        "x_class",
    ]


def test_a_shape_outside_is_found(tmp_path):
    """The first input that does not fit is named; a length that two inputs share has to be the same."""
    entry, _ = export_entry(Tagger().eval(), tagger_batch(2), [0, 0], folder=tmp_path, most=4)
    assert misfit(entry, [(4, 12), (4, 12)]) is None
    for shapes in ([(5, 12), (5, 12)], [(2, 13), (2, 13)], [(2, 3, 1), (2, 3)]):
        wrong = misfit(entry, shapes)
        assert wrong is not None
        assert wrong.name == "tokens"
    shorter = misfit(entry, [(2, 12), (3, 12)])
    assert shorter is not None
    assert shorter.name == "mask"


def test_an_entry_comes_back_from_json(tmp_path):
    """to_dict and from_dict are inverse."""
    entry, _ = export_entry(Mlp().eval(), torch.randn(2, 16), [0], folder=tmp_path, most=4)

    assert Entry.from_dict(entry.to_dict()) == entry


def test_outputs_of_a_dataclass_that_torch_knows(tmp_path):
    """Registered output classes are taken apart by their fields."""

    @dataclass
    class Out:
        first: torch.Tensor
        second: torch.Tensor

    torch.export.register_dataclass(Out, serialized_type_name="tests.Out")

    class Gives(nn.Module):
        def forward(self, x):
            return Out(x + 1, x * 2)

    entry, _ = export_entry(Gives().eval(), torch.randn(2, 6), [0], folder=tmp_path, most=8)

    assert len(entry.outputs) == 2


def test_outputs_of_a_class_come_back_as_it():
    """A dataclass that pytree does not know, and transformers' outputs: their loss reads attributes."""

    @dataclass
    class Answer:
        mean: torch.Tensor
        steps: int
        rest: tuple[torch.Tensor, ...]

    class Answers(nn.Module):
        def forward(self, x):
            return Answer(mean=x.mean(), steps=3, rest=(x, x * 2))

    x = torch.randn(2, 3)
    flat = Flat.of(Answers(), x)
    tensors = flat.flatten_outputs(Answers()(x))
    back = flat.unflatten_outputs(tensors)

    assert len(tensors) == 3
    assert flat.output_names(Answers()(x)) == ["mean", "rest_0", "rest_1"]
    assert isinstance(back, Answer)
    assert torch.equal(back.rest[1], x * 2)

    outputs = pytest.importorskip("transformers").modeling_outputs.SequenceClassifierOutput(logits=x)
    assert torch.equal(flat.unflatten_outputs(flat.flatten_outputs(outputs)).logits, x)
