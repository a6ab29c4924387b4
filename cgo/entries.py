"""What a document says of one model: where it starts from, and how it is trained."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from cgo.dtypes import DTYPES
from cgo.errors import GraphDataError
from cgo.ids import MODEL_ID
from cgo.limits import MOST_ELEMENTS, MOST_NAME, MOST_TEXT, check_tensor
from cgo.model import TrainingSpec, canonical_json, raising

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!a:.60} has characters that cannot be printed")
    return text


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"Input should be one of {', '.join(sorted(DTYPES))}")
    return name


#: Texts as pydantic validates them; `cgo.ids` has the rule of ids.
Id = Annotated[str, Field(pattern=f"^{MODEL_ID.pattern}$")]
Name = Annotated[str, Field(max_length=MOST_NAME), AfterValidator(_printable)]
DtypeName = Annotated[
    str, AfterValidator(_known_dtype), Field(json_schema_extra={"enum": sorted(DTYPES)})
]
Size = Annotated[int, Field(ge=0, le=MOST_ELEMENTS)]


@raising(GraphDataError)
@dataclass(frozen=True, config=_CONFIG)
class FileRef:
    """A file beside the document, with the SHA-256 of its content."""

    file: Name
    sha256: Annotated[str, Field(max_length=64)]


@raising(GraphDataError)
@dataclass(frozen=True, config=_CONFIG)
class Factory:
    """What builds a module: called with `kwargs` right after `torch.manual_seed(seed)`."""

    target: Name
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    @field_validator("kwargs")
    @classmethod
    def _kwargs(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        return canonical_json(kwargs, what="kwargs")  # type: ignore[no-any-return]


@raising(GraphDataError)
@dataclass(frozen=True, config=_CONFIG)
class StateEntry:
    """One parameter or buffer, under the module's own name."""

    path: Name
    kind: Literal["parameter", "buffer"]
    dtype: DtypeName
    shape: tuple[Size, ...]
    trainable: bool = False
    persistent: bool = True  # False: a buffer that state_dict leaves out
    alias_of: Name | None = None  # tied: the path that holds the tensor

    @field_validator("shape")
    @classmethod
    def _shape(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        try:
            check_tensor("shape", shape)
        except GraphDataError as error:
            raise ValueError(str(error)) from error
        return shape


@raising(GraphDataError)
@dataclass(frozen=True, config=_CONFIG)
class ModelEntry:
    """One model of the trial. Exactly one of `factory` and `weights` is given."""

    id: Id
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    data: Name  # digest of its DataSpec
    training: TrainingSpec
    state: tuple[StateEntry, ...]  # in the module's own order
    factory: Factory | None = None
    weights: FileRef | None = None
    # Why it is not captured; its factory's module is called instead.
    opaque: Annotated[str, Field(max_length=MOST_TEXT)] | None = None
    begun: FileRef | None = None  # what the first call of the factory's module sets up
