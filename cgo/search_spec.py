"""A search as a YAML file: data, training and models, validated as a whole."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cgo.errors import SpecError
from cgo.model import DataSpec, Model, TrainingSpec, describe


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelsSpec(_Strict):
    """One module, and the ways in which it is to be tried."""

    module: str = Field(description="'package.module:callable' that returns an nn.Module")
    name: str | None = Field(None, description="prefix of the model ids; the callable's name")
    kwargs: dict[str, Any] = Field({}, description="arguments that all of these models share")
    grid: dict[str, list[Any]] = Field({}, description="arguments to try in all combinations")
    seeds: list[int] = Field([0], min_length=1, description="one model for each")
    training: dict[str, Any] = Field({}, description="changes to the file's training section")

    def combinations(self) -> Iterator[dict[str, Any]]:
        """The arguments of each model, in the order of the grid."""
        for values in itertools.product(*self.grid.values()):
            yield {**self.kwargs, **dict(zip(self.grid, values))}


class EngineSpec(_Strict):
    """Arguments of the engine."""

    experiment_dir: Path | None = Field(None, description="relative to the file")
    import_paths: list[Path] = Field([Path(".")], description="relative to the file")
    max_models: int | None = Field(None, ge=1)
    max_duration_s: float | None = Field(None, gt=0)


class SearchSpec(_Strict):
    """A search file."""

    data: dict[str, Any] = Field(description="arguments of cgo.DataSpec")
    training: dict[str, Any] = Field({}, description="arguments of cgo.TrainingSpec")
    models: list[ModelsSpec] = Field(min_length=1)
    engine: EngineSpec = EngineSpec()

    def build(self) -> list[Model]:
        """The models of the search; their modules must be importable by now.

        Raises:
            SpecError: a section is refused; names it.
        """
        data = _made("data", DataSpec, self.data)
        models = []
        for position, entry in enumerate(self.models):
            where = f"models[{position}]"
            training = _made(f"{where}.training", TrainingSpec, self.training | entry.training)
            name = entry.name or entry.module.rpartition(":")[2]
            for number, (kwargs, seed) in enumerate(
                itertools.product(entry.combinations(), entry.seeds)
            ):
                try:
                    model = Model(
                        entry.module,
                        kwargs,
                        data=data,
                        training=training,
                        seed=seed,
                        model_id=f"{name}-{position}.{number}",
                    )
                except SpecError as error:
                    raise SpecError(f"{where}: {error}") from error
                models.append(model)
        return models


def _made(where: str, cls: type[Any], values: dict[str, Any]) -> Any:
    unknown = set(values) - {field.name for field in fields(cls)}
    if unknown:
        raise SpecError(f"{where}: unknown fields {', '.join(sorted(unknown))}")
    try:
        return cls(**values)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error
    except TypeError as error:
        raise SpecError(f"{where}: {error}") from error


def load(path: Path) -> SearchSpec:
    """Read a search file, and put its import paths on `sys.path`.

    Raises:
        SpecError: it is not there, not YAML, or does not fit the schema; names the field.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not YAML: {error}") from error
    try:
        spec = SearchSpec.model_validate(values)
    except ValidationError as error:
        raise SpecError(f"{path}: {describe(error)}") from error
    folder = path.resolve().parent
    engine = spec.engine.model_copy(
        update={
            "import_paths": [folder / item for item in spec.engine.import_paths],
            "experiment_dir": spec.engine.experiment_dir and folder / spec.engine.experiment_dir,
        }
    )
    for root in map(str, engine.import_paths):
        if root not in sys.path:
            sys.path.insert(0, root)
    return spec.model_copy(update={"engine": engine})


def schema() -> dict[str, Any]:
    """The JSON schema of a search file; published as `cgo/search.schema.json`."""
    return SearchSpec.model_json_schema()


def write_schema(path: Path) -> None:
    """Publish the schema."""
    path.write_text(json.dumps(schema(), indent=2) + "\n")
