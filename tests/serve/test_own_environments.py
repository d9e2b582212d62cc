"""What LiteRT and TVM rest on here: a ladder of batches, simplified programs, an environment of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from plait.errors import ServeError
from plait.serve.ladder import at_batch, filled_up, ladder
from plait.serve.litert import LiteRt
from plait.serve.simplify import simplified
from plait.serve.subject import Entry, Sample, Subject, TensorSpec
from plait.serve.tvm import Tvm, _order


def subject(dims: dict[str, tuple[int, int]]) -> Subject:
    """A subject with one entry point; nothing of it is on disk."""
    shape = tuple(dims) or (3,)
    entry = Entry(
        inputs=(TensorSpec("x", "float32", shape),),
        outputs=(TensorSpec("y", "float32", shape),),
        dims=dims,
        samples=(Sample("a", dict.fromkeys(dims, 2)),),
    )
    return Subject(
        folder=Path(),
        name="m",
        entries={"forward": entry},
        parameter_bytes=4,
        weights="given",
        weights_sha256="",
        source="m",
        convolutions=False,
    )


@pytest.mark.parametrize(("most", "steps"), [(1, [1]), (2, [1, 2]), (8, [1, 4, 8]), (32, [1, 4, 16, 32])])
def test_the_ladder_ends_with_the_largest(most: int, steps: list[int]):
    """1, 4, 16 ... and the largest batch asked for."""
    one = subject({"batch": (1, most)})

    assert ladder(one, one.entries["forward"]) == steps


def test_a_closed_batch_is_the_only_step():
    """Where the batch is closed, or there is none, there is one graph."""
    one = replace(subject({"batch": (1, 8)}), closed={"batch": 2})
    none = subject({})

    assert ladder(one, one.entries["forward"]) == [2]
    assert ladder(none, none.entries["forward"]) == [1]


def test_batches_are_cut_repeated_and_filled_up():
    """Samples as they come, over again; a batch between two steps ends in copies of its last sample."""
    entry = subject({"batch": (1, 8)}).entries["forward"]
    value = torch.tensor([1.0, 2.0, 3.0])

    assert at_batch((value,), entry, 5)[0].tolist() == [1, 2, 3, 1, 2]
    assert at_batch((value,), entry, 2)[0].tolist() == [1, 2]
    assert filled_up(value, 5).tolist() == [1, 2, 3, 3, 3]


class Masked(nn.Module):
    """A mask out of sums of truth values, as recent decoders make it; its positions depend on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        new = (torch.diff(places, prepend=places[:1] - 1) != 1).cumsum(-1)
        seen = (places[None] <= places[:, None]) & (new[None] == new[:, None])
        scores = self.layer(x) @ x.transpose(1, 2)
        counted = (x > 0).sum(-1, keepdim=True)
        return scores.masked_fill(~seen, -1e9).softmax(-1) + counted


def test_simplified_computes_the_same_with_less():
    """Equal bit for bit; the mask is a constant, what depends on the input is counted in whole numbers."""
    module = Masked().eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(module, (torch.randn(2, 5, 4),), dynamic_shapes=shapes)
    x = torch.randn(3, 5, 4)
    made = simplified(program, (x,))
    operators = [str(node.target) for node in made.graph.nodes]

    assert torch.equal(made.module()(x), module(x))
    assert not any("arange" in name or "cumsum" in name for name in operators)
    sums = [node for node in made.graph.nodes if str(node.target) == "aten.sum.dim_IntList"]
    assert [node.args[0].meta["val"].dtype for node in sums] == [torch.int64]


def test_random_numbers_are_not_frozen():
    """What draws by chance is no constant."""

    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(3)

    x = torch.zeros(3)
    made = simplified(torch.export.export(Noisy(), (x,)), (x,)).module()

    assert not torch.equal(made(x), made(x))


@pytest.mark.parametrize("backend", [LiteRt(), Tvm()])
def test_without_its_environment_a_backend_names_the_command(
    backend: LiteRt | Tvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Neither crashes nor downloads."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    with pytest.raises(ServeError, match=f"environment {backend.name} is not there") as caught:
        backend.interpreter()

    assert caught.value.hint == f"python -m plait.environments make {backend.name}"
    assert f"python -m plait.environments make {backend.name}" in backend.missing()


@pytest.mark.parametrize("facts", [{}, {"parameters": 3}, {"parameters": {"forward-bx": []}}, {"parameters": {}}])
def test_malformed_facts_of_a_tvm_artefact(facts: dict[str, object]):
    """They come from a file: refused, not trusted."""
    with pytest.raises(ServeError, match="tvm: "):
        _order(facts, "forward")
