"""torch.distributed.checkpoint's planners and storage in terms of layouts, safetensors files and a JSON index.

torch's own writer keeps its index as a pickle, and its safetensors writer holds one piece of a name per file; hence
these four small classes. `checkpoint_index.py` draws the directory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from plait.errors import CheckpointError
from plait.run.checkpoint_index import INDEX, Index, PieceFiles, StoredPiece, StoredTensor
from plait.run.layout import Layout, Piece
from plait.run.tensor_file import write_tensors

__all__ = ["PieceReader", "PieceWriter", "ReadPlanner", "Shard", "WritePlanner"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One process's part of one tensor."""

    tensor: torch.Tensor
    layout: Layout
    owns: bool = True
    """Whether this process writes it; of replicas, one does."""


class WritePlanner(DefaultSavePlanner):
    """Announces the pieces this process owns; DCP checks that all of them make up each tensor, once."""

    def __init__(self, shards: Mapping[str, Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards

    def create_local_plan(self) -> SavePlan:
        """One item per piece."""
        items = [item for name, shard in self._shards.items() if shard.owns for item in _write_items(name, shard)]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The piece, a view of the local tensor."""
        shard = self._shards[write_item.index.fqn]
        return shard.tensor.detach()[_piece_at(shard, write_item.index).in_local()]


class PieceWriter(StorageWriter):
    """Writes a process's pieces to one safetensors file; the first process writes the index."""

    def __init__(self, directory: Path, extra: Mapping[str, Any], world_size: int) -> None:
        super().__init__()
        self._directory = directory
        self._extra = extra
        self._world_size = world_size
        self._rank = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between checkpoints."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Learn the rank."""
        self._rank = kwargs.get("rank") or 0

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One tensor of the file at a time."""
        name = f"rank-{self._rank:05d}.safetensors"
        specs, results, nbytes = [], [], 0
        for item in plan.items:
            data, offset = item.tensor_data, item.index.offset
            assert data is not None
            assert offset is not None
            key = f"{item.index.fqn}@{','.join(map(str, offset))}"
            specs.append((key, data.properties.dtype, tuple(data.chunk.sizes)))
            results.append((item, key))
        if specs:
            tensors = (planner.resolve_data(item) for item in plan.items)
            nbytes = write_tensors(self._directory / name, specs, tensors)  # type: ignore[arg-type]
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, nbytes, (name, key)) for item, key in results])
        return done

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, from what DCP has gathered."""
        places = {result.index: result.storage_data for written in results for result in written}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, dcp.TensorStorageMetadata)
            pieces = tuple(
                StoredPiece(tuple(c.offsets), tuple(c.sizes), *places[dcp.MetadataIndex(name, c.offsets)])
                for c in tensor.chunks
            )
            tensors[name] = StoredTensor(tuple(tensor.size), tensor.properties.dtype, pieces)
        files = {result.storage_data[0]: result.size_in_bytes for written in results for result in written}
        Index(tensors, files, self._world_size, self._extra).write(self._directory / INDEX)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        """Directories are given to the constructor."""
        return True


class ReadPlanner(DefaultLoadPlanner):
    """Asks for the pieces this process holds, after checking that the checkpoint has them in shape and dtype."""

    def __init__(self, shards: Mapping[str, Shard], index: Index, directory: Path, *, strict: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards
        self._index = index
        self._directory = directory
        self._strict = strict

    def create_local_plan(self) -> LoadPlan:
        """One item per overlap of a local piece with a stored one; the names go along for the check of all."""
        found = _as_dcp(self._index)
        items: list[ReadItem] = []
        for name, shard in self._shards.items():
            self._check(name, shard)
            chunks = [_chunk(piece) for piece in shard.layout.pieces if math.prod(piece.size)]
            stored = found.state_dict_metadata[name]
            assert isinstance(stored, dcp.TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items, planner_data=sorted(self._shards))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Refuse a checkpoint that holds more than all processes together ask for."""
        wanted = {name for plan in global_plan for name in plan.planner_data}
        extra = sorted(set(self._index.tensors) - wanted)
        if self._strict and extra:
            raise CheckpointError(
                f"checkpoint {self._directory} is from another model or optimizer: it also holds {extra[0]}"
                + (f" and {len(extra) - 1} more names that this one does not have" if len(extra) > 1 else "")
            )
        return global_plan

    def _check(self, name: str, shard: Shard) -> None:
        stored = self._index.tensors.get(name)
        where = f"checkpoint {self._directory}"
        if stored is None:
            raise CheckpointError(f"{where} is from another model or optimizer: it has no {name}")
        if stored.shape != shard.layout.shape:
            raise CheckpointError(
                f"{where} is from another model: {name} is {_text(stored.shape)} there, {_text(shard.layout.shape)} here"
            )
        if stored.dtype != shard.tensor.dtype:
            here, there = (str(dtype).removeprefix("torch.") for dtype in (shard.tensor.dtype, stored.dtype))
            raise CheckpointError(f"{where}: {name} is {there} there, {here} here")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Where the read values go, a view of the local tensor."""
        shard = self._shards[read_item.dest_index.fqn]
        target = shard.tensor.detach()[_piece_at(shard, read_item.dest_index).in_local()]
        return target[_box(read_item.dest_offsets, read_item.lengths)]


class PieceReader(StorageReader):
    """Reads from safetensors files just the parts asked for."""

    def __init__(self, directory: Path, index: Index) -> None:
        super().__init__()
        self._directory = directory
        self._index = index

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:  # noqa: ARG002
        """From the index that was read before."""
        return _as_dcp(self._index)

    def set_up_storage_reader(self, metadata: dcp.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy each part to its place."""
        with PieceFiles(self._directory) as files:
            for item, piece in self._with_pieces(plan):
                values = files.read(piece, _box(item.storage_offsets, item.lengths))
                target = planner.resolve_tensor(item)
                assert values.shape == target.shape
                target.copy_(values)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _with_pieces(self, plan: LoadPlan) -> Iterator[tuple[ReadItem, StoredPiece]]:
        pieces = {
            (name, piece.offsets): piece for name, stored in self._index.tensors.items() for piece in stored.pieces
        }
        for item in plan.items:
            offset = item.storage_index.offset
            assert offset is not None
            yield item, pieces[item.storage_index.fqn, tuple(offset)]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        """Directories are given to the constructor."""
        return True


def _as_dcp(index: Index) -> dcp.Metadata:
    """The index in DCP's own record."""
    tensors: dict[str, Any] = {}
    for name, stored in index.tensors.items():
        chunks = [dcp.ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.size)) for p in stored.pieces]
        properties = dcp.TensorProperties(dtype=stored.dtype)
        tensors[name] = dcp.TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
    return dcp.Metadata(tensors)


def _write_items(name: str, shard: Shard) -> list[WriteItem]:
    properties = dcp.TensorProperties(dtype=shard.tensor.dtype)
    size = torch.Size(shard.layout.shape)
    return [
        WriteItem(
            index=dcp.MetadataIndex(name, torch.Size(piece.whole)),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=_chunk(piece), properties=properties, size=size),
        )
        for piece in shard.layout.pieces
    ]


def _chunk(piece: Piece) -> dcp.ChunkStorageMetadata:
    return dcp.ChunkStorageMetadata(torch.Size(piece.whole), torch.Size(piece.size))


def _piece_at(shard: Shard, index: dcp.MetadataIndex) -> Piece:
    assert index.offset is not None
    return next(piece for piece in shard.layout.pieces if piece.whole == tuple(index.offset))


def _box(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
