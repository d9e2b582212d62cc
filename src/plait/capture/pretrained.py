"""The weights of a folder, tensor by tensor: only what is asked for is ever read into memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

__all__ = ["load_mapped"]


def load_mapped(model: nn.Module, folder: Path) -> bool:
    """Copy the folder's safetensors into a model of the same names; False (and nothing done) where names or shapes differ.

    The source tensors are views of the mapped files. A model built without memory (`deferred`) keeps those views, so
    that each tensor is read when, and where, it is wanted.
    """
    files = _files(folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {**parameters, **{n: b for n, b in model.named_buffers() if n in model.state_dict()}}
    keys = _keys(wanted, files, getattr(model, "base_model_prefix", ""))
    # A tied weight is stored under one of its names.
    tied: dict[int, list[str]] = {}
    for name, parameter in wanted.items():
        tied.setdefault(id(parameter), []).append(name)
    sources: dict[str, str] = {}
    for names in tied.values():
        found = next((keys[name] for name in names if name in keys), None)
        if found is None:
            return False
        sources[names[0]] = found
    tensors = {}
    for file in set(files.values()):
        with safe_open(file, framework="pt") as opened:
            for name, key in sources.items():
                if files[key] == file:
                    tensors[name] = opened.get_tensor(key)
    if any(tensors[name].shape != wanted[name].shape for name in sources):
        return False
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)
    return True


def _files(folder: Path) -> dict[str, Path]:
    """File of each stored tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {key: folder / name for key, name in json.loads(index.read_text())["weight_map"].items()}
    file = folder / "model.safetensors"
    if not file.is_file():
        return {}
    with safe_open(file, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), file)


def _keys(names: Iterable[str], files: dict[str, Path], prefix: str) -> dict[str, str]:
    """Stored key of each name: the same, or that of the model without its head (`transformer.wte` as `wte`)."""
    keys = {}
    for name in names:
        for key in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if key in files:
                keys[name] = key
                break
    return keys
