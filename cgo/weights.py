"""Weights on disk: one safetensors file a model, under the module's own names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cgo.errors import StoreError
from cgo.paths import is_plain


def tensor_hash(tensor: torch.Tensor) -> str:
    """A content hash of dtype, shape and values."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    if plain.numel():
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def save(
    path: Path, state: Mapping[str, torch.Tensor], aliases: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically.

    Args:
        path: The file; replaced as a whole.
        state: Tensors by name; a view is written as its own elements only.
        aliases: Further names of tensors in `state` (tied weights).
    """
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata={"aliases": json.dumps(dict(aliases or {}))})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # a full disk keeps no part of it


def load(path: Path) -> dict[str, torch.Tensor]:
    """Read what `save` wrote, aliases included (tied names share one tensor).

    Raises:
        StoreError: the file is missing, damaged or no plain file.
    """
    try:
        if not is_plain(path):  # opening a pipe would wait for its other end
            raise OSError("there is no plain file")
        with safe_open(path, framework="pt") as reader:
            state = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            aliases = json.loads((reader.metadata() or {}).get("aliases", "{}"))
        return state | {name: state[path_] for name, path_ in aliases.items()}
    except Exception as error:
        raise StoreError(f"cannot read weights {path}: {error}") from error
