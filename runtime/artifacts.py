"""Compiled parts of steps in the user's cache, by structure: for other trials, too.

They are files of torch's own (`torch._inductor.CompiledArtifact`), one a structure, beside the
table of costs. Reading one runs code, so the folder and what is read lie in nobody else's hands:
they belong to this user, and no other may write there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cgo.errors import CgoError
from cgo.private import inductor
from cgo.runtime.cost_table import default_path
from cgo.runtime.structure import Structure

log = logging.getLogger(__name__)

#: Of the folder; what was used longest ago goes first.
_MOST_BYTES = 2**30

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


class ArtifactError(CgoError):
    """A compiled part that is not there, or must not be read."""


class Artifacts:
    """The folder of compiled parts.

    Args:
        folder: Made where it is missing.
        most_bytes: More is deleted by `prune`.

    Raises:
        ArtifactError: it cannot be made, or others may write there.
    """

    def __init__(self, folder: Path, most_bytes: int = _MOST_BYTES) -> None:
        self.folder, self._most_bytes = folder, most_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_others(folder)
        except OSError as error:
            raise ArtifactError(f"compiled parts cannot be kept in {folder}: {error}") from error

    def key(self, structure: Structure) -> str:
        """Names a structure's file: another one for other versions, settings and threads."""
        return hashlib.sha256(f"{structure.digest} {_environment()}".encode()).hexdigest()[:40]

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"{key}.bin"

    def has(self, key: str) -> bool:
        """Whether there is a file."""
        return self.path(key).is_file()

    def load(self, key: str) -> Callable[..., Any]:
        """What was compiled; a file that cannot be read is deleted.

        Raises:
            ArtifactError: there is none, or it is broken, or somebody else's.
        """
        path = self.path(key)
        try:
            _refuse_others(path)
            os.utime(path)  # used now
            with self.torchs_own():
                return inductor.loaded(str(path))
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} is not there") from error
        except Exception as error:  # of a pickle, whatever it is made of
            log.warning("%s is dropped: %s: %s", path, type(error).__name__, error)
            with contextlib.suppress(OSError):
                path.unlink()
            raise ArtifactError(f"{path}: {type(error).__name__}: {error}") from error

    def save(self, key: str, artifact: inductor.Artifact) -> None:
        """Keep what was compiled; as a whole, or not at all."""
        partial = self.folder / f"{key}.{os.getpid()}.part"
        try:
            artifact.save(path=str(partial))
            partial.replace(self.path(key))
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def torchs_own(self) -> Iterator[None]:
        """Inductor's own files lie in the folder, too, and not where others may have written."""
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = str(self.folder / "torch")
        try:
            yield
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before

    def prune(self) -> None:
        """Delete what was used longest ago, where the folder is too large. Torch makes its anew."""
        files = []
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # another process deletes, too
                found = path.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode):
                    files.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._most_bytes:
                break
            total -= size
            with contextlib.suppress(OSError):
                path.unlink()


def default_artifacts() -> Artifacts:
    """Beside the table of costs.

    Raises:
        ArtifactError: as `Artifacts`.
    """
    return Artifacts(default_path().parent / "compiled")


def _refuse_others(path: Path) -> None:
    found = path.stat(follow_symlinks=False)
    if stat.S_ISLNK(found.st_mode):
        raise OSError(f"{path} is a symbolic link")
    if not hasattr(os, "getuid"):
        return
    if found.st_uid != os.getuid():
        raise OSError(f"{path} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"others may write {path}")


def _environment() -> str:
    """What a compiled part depends on beside its structure."""
    known: list[Any] = [torch.__version__, torch.version.cuda, torch.get_num_threads()]
    known += [torch.backends.cpu.get_cpu_capability(), inductor.settings()]
    if torch.cuda.is_available():
        known += [torch.cuda.get_device_capability(), torch.backends.cuda.matmul.fp32_precision]
    return json.dumps(known, default=str)
