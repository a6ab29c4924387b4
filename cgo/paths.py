"""Files that a document or an event names: inside their folder, and plain files."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO


def lies_beside(name: str) -> bool:
    """Whether a name stands, as it is written, for a file inside the folder it is relative to.

    Names are judged by the rules of every system, for a folder may be shared between several.

    Example:
        >>> lies_beside("start/a.safetensors"), lies_beside("../a"), lies_beside("C:/a")
        (True, False, False)
    """
    if not name or "\\" in name or not name.isprintable() or PureWindowsPath(name).drive:
        return False
    path = PurePosixPath(name)
    return path.parts != () and not path.is_absolute() and ".." not in path.parts


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder.

    Args:
        folder: What the name is relative to.
        name: Written with slashes.

    Raises:
        ValueError: the file lies elsewhere, as it is written or where symbolic links lead.
    """
    if not lies_beside(name):
        raise ValueError(f"{name!a:.200} does not lie inside the folder")
    path = folder / name
    try:
        found = path.resolve()
        root = folder.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle; a name that is too long
        raise ValueError(f"{name!a:.200} cannot be found: {error}") from error
    if root not in found.parents:
        raise ValueError(f"{name!a:.200} leads out of its folder, to {found}")
    return path


def open_plain(path: Path) -> BinaryIO:
    """Open a file for reading, unless it is a directory, a pipe, a device or a socket.

    Opening a pipe waits for its other end, and a device may have no end: neither happens here.

    Raises:
        OSError: it is no plain file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no plain file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def is_plain(path: Path) -> bool:
    """Whether there is a plain file, or a link to one."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False


def read_plain(path: Path, most_bytes: int) -> bytes:
    """A plain file's content.

    Raises:
        OSError: it is no plain file, or cannot be read.
        ValueError: it has more than so many bytes.
    """
    with open_plain(path) as stream:
        found = stream.read(most_bytes + 1)
    if len(found) > most_bytes:
        raise ValueError(f"{path}: more than {most_bytes:,} bytes")
    return found


_BINARY = getattr(os, "O_BINARY", 0)  # of Windows


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file so that a crash leaves either the old one or the new one.

    Args:
        path: The file; until all is written, and on the disk, it stays as it is.

    Yields:
        What is to be written to. If that raises, nothing of it stays.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk keeps no part of it
            partial.unlink(missing_ok=True)
        raise
