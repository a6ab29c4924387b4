"""The table of costs: what groups cost by signature, way and width, on disk where that is wanted.

Costs are kept by device, library version and number of threads; a table for common signatures
ships with the package. Beside them stand the choices that were made by them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from cgo.errors import CgoError
from cgo.machine import devices
from cgo.runtime.precision import tf32_key

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Signature:
    """What a cost depends on: `family` without sizes, `sizes` all of them, both as digests."""

    family: str
    sizes: str
    elements: int  # of the largest value


#: Family, sizes, elements, way, width, seconds.
_Row = tuple[str, str, int, str, int, float]


class CostTable:
    """Seconds by signature, way and width; on disk where a path is given.

    Args:
        path: An SQLite file, made if missing; None keeps measurements in memory.
        device: What costs are of.
        shipped: Begin with the costs that ship with the package.
        key: Of a device that is not there; default is that of `device`.
    """

    def __init__(
        self,
        path: Path | None,
        device: torch.device,
        *,
        shipped: bool = True,
        key: str | None = None,
    ) -> None:
        self.key = device_key(device) if key is None else key
        self._rows: dict[tuple[str, str, str, int], tuple[int, float]] = {}
        self._sizes: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
        self._file: sqlite3.Connection | None = None
        self._remembered: dict[str, Any] = {}  # of this process
        self._foreign: dict[tuple[str, str, str, int], float] = {}
        if shipped:
            self._ship(*_shipped(device))
        if path is not None:
            self._open(path)

    def _ship(self, key: str, rows: Iterable[_Row]) -> None:
        """Costs of this very device are as good as measured; of another, better than nothing."""
        for family, sizes, elements, way, width, seconds in rows:
            if key == self.key:
                self._add(family, sizes, elements, way, width, seconds)
            else:
                self._foreign[family, sizes, way, width] = seconds
                self._sizes[family, way, width][elements] = seconds

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=10)
            # What a crash may lose is measured again.
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = OFF")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS costs (device TEXT, family TEXT, sizes TEXT, "
                "elements INTEGER, way TEXT, width INTEGER, seconds REAL, "
                "PRIMARY KEY (device, family, sizes, way, width))"
            )
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS choices (device TEXT, key TEXT, value TEXT, "
                "PRIMARY KEY (device, key))"
            )
            rows = self._file.execute(
                "SELECT family, sizes, elements, way, width, seconds FROM costs WHERE device = ?",
                (self.key,),
            )
            for row in rows:
                self._add(*row)
        except (OSError, sqlite3.Error) as error:
            raise CgoError(
                f"the table of measured costs, {path}, cannot be used: {error}; remove it, or give "
                f"another place in {CACHE}"
            ) from error

    def _add(
        self, family: str, sizes: str, elements: int, way: str, width: int, seconds: float
    ) -> None:
        self._rows[family, sizes, way, width] = elements, seconds
        self._sizes[family, way, width][elements] = seconds

    def close(self) -> None:
        """Close the file; what was read stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def put(self, signature: Signature, way: str, width: int, seconds: float) -> None:
        """Keep a measurement; infinity says that the way cannot be gone."""
        self._add(signature.family, signature.sizes, signature.elements, way, width, seconds)
        if self._file is not None:
            row = (signature.family, signature.sizes, signature.elements, way, width, seconds)
            with self._file:
                self._file.execute(
                    "INSERT OR REPLACE INTO costs VALUES (?, ?, ?, ?, ?, ?, ?)", (self.key, *row)
                )

    def get(self, signature: Signature, way: str, width: int) -> float | None:
        """The measured seconds."""
        found = self._rows.get((signature.family, signature.sizes, way, width))
        return None if found is None else found[1]

    def remember(self, key: str, value: Any, *, anew: bool = False) -> Any:
        """Keep JSON values that were decided by these costs; returns what is kept.

        That is what was decided first, also by another process meanwhile, unless decided `anew`.
        """
        self._remembered.pop(key, None)
        if self._file is not None:
            instead = "REPLACE" if anew else "IGNORE"
            with self._file:
                row = (self.key, key, json.dumps(value))
                self._file.execute(f"INSERT OR {instead} INTO choices VALUES (?, ?, ?)", row)
        kept = self.recall(key)
        self._remembered[key] = value if kept is None else kept
        return self._remembered[key]

    def recall(self, key: str) -> Any:
        """What was kept, by this process or one before; None where nothing was."""
        if key not in self._remembered and self._file is not None:
            asked = "SELECT value FROM choices WHERE device = ? AND key = ?"
            row = self._file.execute(asked, (self.key, key)).fetchone()
            if row is not None:
                try:
                    self._remembered[key] = json.loads(row[0])
                except (TypeError, ValueError, RecursionError) as error:
                    log.warning("a choice in the table of costs cannot be read: %s", error)
                    with self._file:
                        gone = "DELETE FROM choices WHERE device = ? AND key = ?"
                        self._file.execute(gone, (self.key, key))
        return self._remembered.get(key)

    def near(self, signature: Signature, way: str, width: int) -> float | None:
        """Another device's, or interpolated between sizes, in logarithms; beyond in proportion."""
        foreign = self._foreign.get((signature.family, signature.sizes, way, width))
        if foreign is not None:
            return foreign
        known = self._sizes.get((signature.family, way, width))
        if not known:
            return None
        below = max((n for n in known if n <= signature.elements), default=None)
        above = min((n for n in known if n >= signature.elements), default=None)
        if below is None or above is None:
            nearest = below if above is None else above
            assert nearest is not None
            scale = max(1.0, signature.elements / nearest) if above is None else 1.0
            return known[nearest] * scale
        if below == above:
            return known[below]
        share = math.log(signature.elements / below) / math.log(above / below)
        return known[below] ** (1 - share) * known[above] ** share

    def is_near(self, signature: Signature, way: str, width: int, factor: float) -> bool:
        """Whether a size is known that is larger or smaller by no more than a factor."""
        known = self._sizes.get((signature.family, way, width), {})
        return any(
            1 / factor <= elements / signature.elements <= factor and math.isfinite(seconds)
            for elements, seconds in known.items()
        )

    def rows(self) -> list[list[Any]]:
        """All rows as JSON values, for shipping; no number where a way cannot be gone."""
        return [
            [family, sizes, elements, way, width, seconds if math.isfinite(seconds) else None]
            for (family, sizes, way, width), (elements, seconds) in sorted(self._rows.items())
        ]


#: The environment variable that names the folder of the table; the user's cache by default.
CACHE = "CGO_CACHE"


def default_path() -> Path:
    """Where measured costs are kept."""
    base = os.environ.get(CACHE)
    if base:
        return Path(base) / "costs.sqlite"
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "cgo" / "costs.sqlite"


def device_key(device: torch.device) -> str:
    """Device, versions and threads: costs of another key do not hold here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else devices()[0].name
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    products = tf32_key() if device.type == "cuda" else ""
    return f"{device.type} {name}, torch {torch.__version__}, {threads} threads, form 4{products}"


def _shipped(device: torch.device) -> tuple[str, list[_Row]]:
    """The key and the rows of the table that ships with the package."""
    found = files("cgo.runtime").joinpath(f"costs_{device.type}.json")
    if not found.is_file():
        return "", []
    document = json.loads(found.read_text())
    rows = [(*row[:-1], math.inf if row[-1] is None else row[-1]) for row in document["rows"]]
    return document["key"], rows
