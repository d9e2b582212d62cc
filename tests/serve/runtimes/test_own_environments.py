"""What LiteRT and TVM rest on here: a ladder of batches, simplified programs, an environment of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_models import Mlp
from torch import nn

import plait
from plait.environments.make import find
from plait.errors import RequestError, ServeError
from plait.serve.runtimes.ladder import Rung, ladder, rungs, served, unfit
from plait.serve.runtimes.litert import LiteRt
from plait.serve.runtimes.simplify import simplified
from plait.serve.runtimes.tvm import Tvm, _order, _seconds
from plait.serve.runtimes.tvm_spelled import SPELLED
from plait.serve.runtimes.tvm_tuner import _next
from plait.serve.subject import Entry, Sample, Subject, TensorSpec


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


def test_a_batch_between_two_rungs_is_filled_up_and_cut():
    """With copies of its last sample, which the runtime computes in vain; beyond the last rung it is refused."""
    given: list[tuple[str, list[float]]] = []

    def graph(name, rung, inputs):
        given.append((rung.name, inputs[0].tolist()))
        return [inputs[0] + 1]

    run = served(subject({"batch": (1, 8)}).entries["forward"], [Rung(1), Rung(4), Rung(8)], graph)

    assert run([torch.tensor([1.0, 2.0, 3.0])])[0].tolist() == [2, 3, 4]
    assert run([torch.tensor([5.0])])[0].tolist() == [6]
    assert given == [("b4", [1, 2, 3, 3]), ("b1", [5])]
    with pytest.raises(ServeError, match="a batch of 9, and the graphs serve at most 8"):
        run([torch.zeros(9)])


def decoder() -> Subject:
    """A decoder's three entry points with one cache; nothing of it is on disk."""
    tokens, dims = TensorSpec("tokens", "int64", ("batch", "length")), {"batch": (1, 2), "length": (2, 12)}
    cache = TensorSpec("cache_0", "float32", ("batch", 12))
    logits = TensorSpec("logits", "float32", ("batch", 5))
    step = (TensorSpec("tokens", "int64", ("batch", 1)), TensorSpec("position", "int64", (1,)), cache)
    forward = Entry(
        inputs=(tokens,),
        outputs=(TensorSpec("logits", "float32", ("batch", "length", 5)),),
        dims={**dims, "length": (1, 6)},
    )
    prefill = Entry(name="prefill", inputs=(tokens,), outputs=(logits, cache), dims=dims)
    decode = Entry(name="decode", inputs=step, outputs=(logits, cache), dims={"batch": (1, 2), "capacity": (12, 12)})
    return replace(subject({}), entries={"forward": forward, "prefill": prefill, "decode": decode})


def test_a_decoders_lengths_are_served_by_graphs_of_fixed_length():
    """A prompt by the longest graph that is not longer, then position by position; forward by filling up."""
    one, calls = decoder(), []

    def graph(name, rung, inputs):
        calls.append((name, rung.name, inputs[0].tolist()))
        if name == "forward":
            return [inputs[0][..., None].expand(*inputs[0].shape, 5).float()]
        return [inputs[0][:, -1:].expand(-1, 5).float(), torch.zeros(rung.batch, 12)]

    assert [rung.name for rung in rungs(one, "prefill")] == ["b1_l2", "b1_l8", "b2_l2", "b2_l8"]
    assert [rung.name for rung in rungs(one, "forward")] == ["b1_l6", "b2_l6"]
    assert [rung.name for rung in rungs(one, "decode")] == ["b1", "b2"]
    assert all(Rung.parse(rung.name) == rung for name in one.entries for rung in rungs(one, name))
    tokens = torch.tensor([[4, 5, 6, 7]])
    logits, _ = served(one.entries["prefill"], rungs(one, "prefill"), graph)([tokens])
    assert logits.tolist() == [[7] * 5]
    assert calls == [("prefill", "b1_l2", [[4, 5]]), ("decode", "b1", [[6]]), ("decode", "b1", [[7]])]
    (found,) = served(one.entries["forward"], rungs(one, "forward"), graph)([tokens])
    assert found[..., 0].tolist() == [[4, 5, 6, 7]]


def test_an_open_length_of_what_is_no_decoder_is_refused():
    """It would need a graph for every length."""
    one = subject({"batch": (1, 8), "length": (1, 64)})

    assert unfit(one) == "its graphs have fixed sizes, and length is open in forward"
    with pytest.raises(ValueError, match="fixed sizes"):
        rungs(one, "forward")
    assert not unfit(replace(one, closed={"length": 64}))


@pytest.mark.parametrize("name", ["x4", "b", "b4_8", "b4_lx", ""])
def test_names_of_no_rung(name: str):
    """They come from a file."""
    with pytest.raises(ValueError):  # noqa: PT011  its text differs
        Rung.parse(name)


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
        return (scores.masked_fill(~seen, -1e9).softmax(-1) + counted)[:, -1]


def test_simplified_computes_the_same_with_less():
    """Equal bit for bit; the mask is a constant, the input is counted in whole numbers, the last position from the start."""
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
    assert [node.args[2] for node in made.graph.nodes if str(node.target) == "aten.select.int"] == [4]


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


@pytest.mark.parametrize(
    "facts", [{}, {"parameters": 3}, {"parameters": {"forward-bx": []}}, {"parameters": {"forward-b1": 3}}]
)
def test_malformed_facts_of_a_tvm_artefact(facts: dict[str, object]):
    """They come from a file: refused, not trusted."""
    with pytest.raises(ServeError, match="tvm: "):
        _order(facts)


@pytest.mark.parametrize("text", ["-1", "soon", "inf", "nan"])
def test_seconds_of_tuning_are_a_number(text: str, monkeypatch: pytest.MonkeyPatch):
    """Refused before anything is compiled."""
    monkeypatch.setenv("PLAIT_TVM_SECONDS", text)
    with pytest.raises(ServeError, match=f"PLAIT_TVM_SECONDS={text} is no number of seconds"):
        _seconds()


def test_operators_as_tvm_is_given_them():
    """They compute what torch does."""
    x, i, j = torch.randn(4, 5, 6, 3), torch.tensor([0, -1, 2]), torch.tensor([[1], [-2]])
    indexing, truth = SPELLED["aten.index.Tensor"], x[..., 0] > 0

    for name in ("gelu", "sigmoid", "silu"):
        assert torch.allclose(SPELLED[f"aten.{name}.default"](x), getattr(torch.ops.aten, name)(x), atol=1e-6)
    assert torch.allclose(
        SPELLED["aten.gelu.default"](x, approximate="tanh"), nn.functional.gelu(x, approximate="tanh"), atol=1e-6
    )
    for name in ("amax", "amin"):
        for options in ({}, {"dim": (0, -1)}, {"dim": [1], "keepdim": True}):
            assert torch.equal(SPELLED[f"aten.{name}.default"](x, **options), getattr(torch, name)(x, **options))
    assert torch.equal(SPELLED["aten.min.dim"](x, 1)[0], x.min(1).values)
    assert torch.equal(SPELLED["aten.any.default"](i > 1), torch.tensor(True))
    for low, high in ((0, None), (None, 1), (0, 1)):
        assert torch.equal(SPELLED["aten.clamp.default"](i, low, high), i.clamp(low, high))
    assert torch.equal(SPELLED["aten.floor_divide.default"](i, 2), i // 2)
    assert torch.equal(indexing(x, [None, i, j]), x[:, i, j])
    assert torch.equal(indexing(x, [i]), x[i])
    assert torch.equal(indexing(x, [i, None, i]), x[i, :, i])
    assert torch.equal(indexing(x, [truth]), x[truth])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", [{}, {"stride": [2, 3]}, {"stride": [3], "padding": [2, 1], "output_padding": [1]}])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_as_tvm_is_given_them(groups: int, options: dict[str, list[int]], dilation: int):
    """Turned around, they compute what torch's transposed ones do; a norm over groups, too."""
    x, weight, bias = torch.randn(2, 4, 5, 6), torch.randn(4, 3, 3, 4), torch.randn(3 * groups)
    options = {**options, "dilation": [dilation, dilation]}
    want = nn.functional.conv_transpose2d(x, weight, bias, groups=groups, **options)

    got = SPELLED["aten.conv_transpose2d.input"](x, weight, bias, groups=groups, **options)
    assert torch.allclose(got, want, atol=1e-5)
    norm = SPELLED["aten.group_norm.default"]
    assert torch.allclose(
        norm(x, 2, bias[:1].expand(4), None, 1e-3),
        nn.functional.group_norm(x, 2, bias[:1].expand(4), None, 1e-3),
        atol=1e-5,
    )
    assert torch.allclose(norm(x, 4), nn.functional.group_norm(x, 4), atol=1e-5)


def test_the_next_kernel_to_tune():
    """One never measured; then what takes the largest part of its own library, though another's is slower; none at last."""

    def kernel(group: str, cost: float, trials: int, is_done: bool = False) -> SimpleNamespace:
        return SimpleNamespace(group=group, cost=cost, trials=trials, is_done=is_done)

    small, large, other = kernel("0", 1.0, 2), kernel("1", 60.0, 2), kernel("1", 60.0, 2)
    fresh = kernel("1", 1e3, 0)

    assert _next([small, large, other, fresh]) is fresh
    assert _next([small, large, other]) is small
    assert _next([kernel("0", 1.0, 500), large, other]) is large
    assert _next([kernel("0", 1.0, 2, is_done=True)]) is None


def made(name: str) -> None:
    """Skip the test where the environment is not there."""
    try:
        find(name)
    except RequestError as problem:
        pytest.skip(f"{problem.message}: {problem.hint}")


@pytest.mark.parametrize("name", ["litert", "tvm"])
def test_exported_checked_and_loaded_in_its_own_environment(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every batch up to the largest, moved weights too; the finished artefact loads without the export."""
    made(name)
    monkeypatch.setenv("PLAIT_TVM_SECONDS", "3")
    torch.manual_seed(3)
    report = plait.export(
        Mlp(64).eval(), name, inputs=torch.randn(5, 16), output=tmp_path, batch=5, threads=1, seconds=0
    )
    row = report["rows"][0]

    assert row["status"] == "ok", row
    assert [one["sizes"]["batch"] for one in row["parity"]] == [2, 1, 5]
    assert max(one["max_rel"] for one in (*row["parity"], *row.get("perturbed", ()))) <= 1e-5
    assert row["serve_peak_bytes"] > 0
    assert (tmp_path / name / "manifest.json").is_file()
    if name == "tvm":
        assert "kernels tuned by MetaSchedule" in row["facts"]["note"]
        assert (tmp_path / name / "tuning" / "database_tuning_record.json").stat().st_size > 0


def test_smaller_weights_of_litert(tmp_path: Path):
    """Embeddings with linear layers behind them; the error is that of eight bits, and the file is smaller."""
    made("litert")
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(200, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 200)).eval()
    tokens = torch.randint(0, 200, (2, 7))
    report = plait.export(
        model, "litert", inputs=tokens, precision=("int8", "fp16"), output=tmp_path, batch=2, threads=1, seconds=0
    )
    rows = {row["precision"]: row for row in report["rows"]}
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    errors = {precision: max(one["max_rel"] for one in row["parity"]) for precision, row in rows.items()}

    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert rows["int8"]["bytes"] < 0.4 * weights
    assert rows["fp16"]["bytes"] < 0.6 * weights
    assert 1e-6 < errors["fp16"] < 1e-3 < errors["int8"] < 0.05


def test_nothing_to_make_smaller(tmp_path: Path):
    """Said, and no file is left that calls itself int8."""
    made("litert")
    report = plait.export(
        nn.Softmax(-1), "litert", inputs=torch.randn(2, 7), precision="int8", output=tmp_path, seconds=0
    )

    assert report["rows"][0]["status"] == "failed"
    assert "no operator of forward has weights" in report["rows"][0]["error"]
    assert not (tmp_path / "litert-int8").exists()


class Decoder(nn.Module):
    """One block of causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.qkv, self.head = nn.Embedding(19, 8), nn.Linear(8, 24), nn.Linear(8, 19)
        self.position = nn.Embedding(12, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, 19]."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["litert", pytest.param("tvm", marks=pytest.mark.slow)])
def test_a_decoder_generates_the_same_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prompts of every length, from graphs of fixed ones; each sample of prefill and decode is held against eager."""
    made(name)
    monkeypatch.setenv("PLAIT_TVM_SECONDS", "0")
    torch.manual_seed(5)
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    report = plait.export(
        Decoder().eval(), name, inputs=tokens, output=tmp_path, batch=1, threads=1, seconds=0, max_length=12
    )
    row = report["rows"][0]

    assert row["status"] == "ok", row
    assert {one["entry"] for one in row["parity"]} == {"forward", "prefill", "decode"}
    assert row["generation"]["equal"]
    assert row["generation"]["tokens"] > 4
