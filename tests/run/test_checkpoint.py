"""Checkpoints are read back bit for bit under any layout, and never half."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open

from plait.errors import CheckpointError, PlaitError
from plait.run import checkpoint
from plait.run.checkpoint import Shard, iterate_whole, latest, load, save
from plait.run.layout import Layout

SHAPES: dict[str, tuple[int, ...]] = {"embed.weight": (10, 6), "qkv.weight": (12, 6), "norm": (5,), "scale": ()}
OPTIMIZER = {f"optimizer.exp_avg.{name}": shape for name, shape in SHAPES.items()}
DTYPES = {"norm": torch.bfloat16, "scale": torch.int64}


def whole(name: str) -> torch.Tensor:
    """The values of a tensor, known to every process."""
    shape = {**SHAPES, **OPTIMIZER}[name]
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return (torch.randn(shape, generator=generator) * 100).to(DTYPES.get(name, torch.float32))


def plain(name: str, rank: int, world: int) -> tuple[Layout, bool]:
    """Rows of everything, uneven; the last rank of many may hold none."""
    full = Layout.full({**SHAPES, **OPTIMIZER}[name])
    if not full.shape:
        return full, rank == 0
    size = -(-full.shape[0] // world)
    return full.rows(rank * size, (rank + 1) * size), True


def braided(name: str, rank: int, world: int) -> tuple[Layout, bool]:
    """Fused projections split block by block, then by rows; norms replicated; embeddings by columns."""
    full = Layout.full({**SHAPES, **OPTIMIZER}[name])
    if name.endswith("qkv.weight"):
        halves = full.split(0, (4, 4, 4), rank % 2, 2)
        rows = -(-halves.local_shape[0] // max(world // 2, 1))
        return halves.rows(rank // 2 * rows, (rank // 2 + 1) * rows), True
    if name.endswith("embed.weight"):
        return full.split(1, (6,), rank, world), True
    return full, rank == world - 1


Layouts = Callable[[str, int, int], tuple[Layout, bool]]


def shards(layouts: Layouts, rank: int, world: int, *, fill: bool) -> dict[str, Shard]:
    """A process's shards, with their values or with nonsense."""
    found = {}
    for name in (*SHAPES, *OPTIMIZER):
        layout, owns = layouts(name, rank, world)
        local = layout.take(whole(name))
        found[name] = Shard(local if fill else torch.full_like(local, 7), layout, owns)
    return found


def save_some(run_dir: Path, step: int, layouts: Layouts, rank: int = 0, world: int = 1, **options: Any) -> Path:
    """Save the known values."""
    mine = shards(layouts, rank, world, fill=True)
    state = {"betas": (0.9, 0.999), "milestones": {3: 1}, "rate": torch.tensor(0.5)}
    return save(
        run_dir,
        step,
        mine,
        state=state,
        rank_state={"rng": torch.tensor([rank, 1], dtype=torch.uint8)},
        model=list(SHAPES),
        aliases={"head.weight": "embed.weight"},
        **options,
    )


def check_load(
    directory: Path, layouts: Layouts, rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None
) -> checkpoint.Restored:
    """Load and compare with the known values."""
    mine = shards(layouts, rank, world, fill=False)
    restored = load(directory, mine, group=group)
    for name, shard in mine.items():
        assert torch.equal(shard.tensor, shard.layout.take(whole(name))), (name, rank)
    return restored


def worker(rank: int, world: int, function: Callable[..., None], folder: str, *args: Any) -> None:
    """One process of a gloo group that meets in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{world}-{function.__name__}", rank=rank, world_size=world
    )
    try:
        function(rank, world, Path(folder), *args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def spawn(world: int, function: Callable[..., None], folder: Path, *args: Any) -> None:
    """Run a function in `world` processes and raise what they raise."""
    mp.spawn(worker, (world, function, str(folder), *args), nprocs=world)


def check_restored(restored: checkpoint.Restored, rank_state: dict[str, Any] | None) -> None:
    """The state beside the tensors is what was saved, in value and type."""
    assert restored.step == 120
    assert restored.state["betas"] == (0.9, 0.999)
    assert restored.state["milestones"] == {3: 1}
    assert torch.equal(restored.state["rate"], torch.tensor(0.5))
    assert str(restored.rank_state) == str(rank_state)


def saves_and_loads(rank: int, world: int, folder: Path) -> None:
    """Four processes save; four read under another layout, then two, then each by itself."""
    directory = save_some(folder, 120, braided, rank, world)
    own = {"rng": torch.tensor([rank, 1], dtype=torch.uint8)}
    check_restored(check_load(directory, plain, rank, world), own)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    check_restored(check_load(directory, braided, rank % 2, 2, group=pairs[rank // 2]), None)
    dist.destroy_process_group()
    check_restored(check_load(directory, plain), None)


@pytest.mark.multi
def test_a_checkpoint_is_read_under_another_layout(tmp_path: Path) -> None:
    """Fused pieces, columns and replicas saved by four processes are read by four, two and one, bit for bit."""
    spawn(4, saves_and_loads, tmp_path)

    whole_model = dict(iterate_whole(tmp_path / "checkpoints" / "step-00000120"))
    assert list(whole_model) == list(SHAPES)
    assert all(torch.equal(tensor, whole(name)) for name, tensor in whole_model.items())


def fails_on_one(rank: int, world: int, folder: Path) -> None:
    """Rank 1 cannot write; every process hears of it."""
    save_some(folder, 1, plain, rank, world)
    mine = shards(plain, rank, world, fill=True)
    with pytest.raises(PlaitError, match=r"rank_state\.f is a builtin_function_or_method"):
        save(folder, 2, mine, state={}, rank_state={"f": print} if rank else {}, model=list(SHAPES))
    if rank:
        mine["embed.weight"] = Shard(mine["embed.weight"].tensor, mine["embed.weight"].layout, owns=False)
    with pytest.raises(PlaitError, match=r"step-00000003 cannot be written: .*embed\.weight"):
        save(folder, 3, mine, state={})
    found = latest(folder)
    assert found is not None
    assert found.name == "step-00000001"
    wrong = shards(plain, rank, world, fill=False)
    if rank:
        wrong["another"] = wrong.pop("norm")
    with pytest.raises(CheckpointError, match="another model or optimizer: it has no another"):
        load(found, wrong)
    check_load(found, plain, rank, world)


@pytest.mark.multi
def test_what_fails_on_one_process_is_raised_on_all(tmp_path: Path) -> None:
    """Nobody waits for a process that has given up, and the older checkpoint stays readable."""
    spawn(2, fails_on_one, tmp_path)


def test_one_process_needs_no_group(tmp_path: Path) -> None:
    """Alone, everything works without torch.distributed."""
    directory = save_some(tmp_path, 120, plain)

    assert directory == latest(tmp_path) == tmp_path / "checkpoints" / "step-00000120"
    check_restored(check_load(directory, braided), {"rng": torch.tensor([0, 1], dtype=torch.uint8)})


def test_the_whole_model_is_plain_safetensors(tmp_path: Path) -> None:
    """Anyone reads it: the user's names, whole tensors, tied names in the metadata as safetensors keeps them."""
    directory = save_some(tmp_path, 1, plain)

    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(SHAPES)
        assert all(torch.equal(file.get_tensor(name), whole(name)) for name in SHAPES)
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    """Older checkpoints go, leftovers of stopped runs too, and a step saved again replaces itself."""
    (tmp_path / "checkpoints" / "step-00000009.tmp").mkdir(parents=True)
    for step in (1, 2, 3, 3):
        save_some(tmp_path, step, plain, keep=2)

    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_a_crash_while_writing_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is only one when it is complete; the next attempt is not in its way."""
    save_some(tmp_path, 1, plain)
    with monkeypatch.context() as broken:
        broken.setattr(
            checkpoint, "write_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(PlaitError, match=r"step-00000002 cannot be written.*No space left"):
            save_some(tmp_path, 2, plain)

    assert (tmp_path / "checkpoints" / "step-00000002.tmp").is_dir()
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-00000001"
    save_some(tmp_path, 2, plain)
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-00000002"


def test_no_run_has_no_checkpoint(tmp_path: Path) -> None:
    """A directory that is not there yet is where a run starts."""
    assert latest(tmp_path / "nowhere") is None


def broken(directory: Path, case: str) -> None:
    """Damage a checkpoint."""
    rank, index = directory / "rank-00000.safetensors", directory / "index.json"
    data = json.loads(index.read_text())
    if case == "truncated":
        os.truncate(rank, rank.stat().st_size - 10)
    elif case == "missing":
        rank.unlink()
    elif case == "truncated index":
        index.write_text(index.read_text()[:-100])
    elif case == "gap":
        data["tensors"]["qkv.weight"]["pieces"][0][1] = [1, 6]
        index.write_text(json.dumps(data))
    elif case == "outside":
        data["tensors"]["norm"]["pieces"][0][2] = "../rank-00000.safetensors"
        index.write_text(json.dumps(data))
    elif case == "scrambled":
        rank.write_bytes(b"\xff" * rank.stat().st_size)
    elif case == "pickle":
        index.write_bytes(pickle.dumps(data))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", r"rank-00000.safetensors is truncated or changed: \d+ bytes of \d+"),
        ("missing", "rank-00000.safetensors is missing"),
        ("truncated index", "index.json cannot be read"),
        ("gap", "qkv.weight: its pieces do not make up"),
        ("outside", "is no file name"),
        ("scrambled", "rank-00000.safetensors is broken"),
        ("pickle", "index.json cannot be read"),
    ],
)
def test_damage_is_refused(tmp_path: Path, case: str, message: str) -> None:
    """A broken checkpoint is a checkpoint error that says which file, never wrong values."""
    directory = save_some(tmp_path, 1, plain)
    broken(directory, case)

    with pytest.raises(CheckpointError, match=message):
        load(directory, shards(plain, 0, 1, fill=False))


def test_another_model_is_refused(tmp_path: Path) -> None:
    """The first name that does not fit is named, with both shapes."""
    directory = save_some(tmp_path, 1, plain)
    mine = shards(plain, 0, 1, fill=False)
    other = {**mine, "norm": Shard(torch.zeros(4), Layout.full((4,)))}
    fewer = {name: shard for name, shard in mine.items() if name in SHAPES}
    double = {**mine, "norm": Shard(torch.zeros(5), Layout.full((5,)))}

    with pytest.raises(CheckpointError, match="from another model: norm is 5 there, 4 here"):
        load(directory, other)
    with pytest.raises(CheckpointError, match=r"also holds optimizer\.exp_avg\.embed\.weight and 3 more"):
        load(directory, fewer)
    with pytest.raises(CheckpointError, match="norm is bfloat16 there, float32 here"):
        load(directory, double)
    load(directory, fewer, strict=False)


def test_state_that_cannot_be_kept_is_refused_by_path(tmp_path: Path) -> None:
    """A function in a scheduler's state has no place in a file."""
    with pytest.raises(PlaitError, match=r"state\.scheduler\.lr_lambdas\[0\] is a function"):
        save(tmp_path, 1, {}, state={"scheduler": {"lr_lambdas": [lambda epoch: epoch]}})
