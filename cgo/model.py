"""What a user submits: `DataSpec`, `TrainingSpec`, `Model`."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from cgo.errors import CgoError, SpecError
from cgo.ids import checked_id
from cgo.imports import is_import_path, resolve

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")

_CONFIG = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)

#: The functions of `torch.nn.functional` that a loss may be.
LOSSES = frozenset(
    """
    binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cosine_similarity
    cross_entropy ctc_loss gaussian_nll_loss hinge_embedding_loss huber_loss kl_div l1_loss
    linear_cross_entropy margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss
    multilabel_soft_margin_loss nll_loss pairwise_distance poisson_nll_loss smooth_l1_loss
    soft_margin_loss triplet_margin_loss triplet_margin_with_distance_loss
    """.split()  # noqa: SIM905
)

#: Why each of these cannot be used; anything else in torch is accepted.
REFUSED_OPTIMIZERS = {"LBFGS": "it needs a closure that evaluates the model several times a step"}
REFUSED_SCHEDULERS = {"ReduceLROnPlateau": "its step() needs a metric"}


def describe(error: ValidationError) -> str:
    """A pydantic error as `field: message` phrases."""
    phrases = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        named = not where or message.startswith(f"{where}:")  # the message names its field itself
        phrases.append(message if named else f"{where}: {message}")
    return "; ".join(phrases)


def raising(kind: type[CgoError]) -> Callable[[type[T]], type[T]]:
    """Let a pydantic dataclass raise an error of ours from its constructor."""

    def decorate(cls: type[T]) -> type[T]:
        validate = cls.__init__

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                validate(self, *args, **kwargs)
            except ValidationError as error:
                raise kind(f"{cls.__name__}: {describe(error)}") from error

        __init__.__signature__ = inspect.signature(cls)  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[assignment]
        return cls

    return decorate


def canonical_json(value: Any, *, what: str) -> Any:
    """`value` as JSON reads it back (tuples become lists).

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be JSON values: {error}") from error


@raising(SpecError)
@dataclass(frozen=True, config=_CONFIG)
class DataSpec:
    """Where batches come from; models whose specs are equal share one loader.

    Args:
        source: "package.module:callable" returning `(train, validation)` map-style data sets of
            `(input, target)`; an input is a tensor, or a tuple or dict of tensors.
        kwargs: JSON keyword arguments of the source.
        batch_size: Samples a step.
        shuffle: Epoch `e` (from 0) visits the training samples in the order
            `torch.randperm(n, generator=torch.Generator().manual_seed(seed + e))`.
        drop_last: Leave out the last, smaller training batch. Validation is always complete.
        seed: Seed of the order, of the source and of augmentation.
        num_workers: Loader processes; 0 loads in the trial's own.
        resident: Whether the data are kept on the device and batched there. None: where both
            are possible without asking, that is a `TensorDataset` of at most a quarter of the
            device's free memory. True: every sample is read once, as epoch 0 reads it, so random
            augmentation inside the data set would stay what it was then; data of more than half
            of the free memory are refused. False: never.
        augment: "package.module:callable" returning an `nn.Module` that changes the inputs of
            training batches, once a batch for all models, on the device. It is called as a model
            is and returns what it was given: a tensor, or as many in a tuple or under the same
            names in a dict. Shapes and dtypes may change, the number of samples may not.
        augment_kwargs: JSON keyword arguments of that callable.

    Batch `b` (from 0) of epoch `e` is augmented, before any model casts it, as by::

        key = int(np.random.SeedSequence((seed, e, b)).generate_state(1, np.uint64)[0]) >> 1
        torch.manual_seed(key), np.random.seed(key % 2**32), random.seed(key)
        with torch.no_grad():
            inputs = module(inputs)

    after which the streams are what they were. `module` is built once, right after
    `torch.manual_seed(seed)`, and stays in the modes in which it was returned. A trial that goes
    on after a crash builds it again, so it must carry nothing from batch to batch.

    Raises:
        SpecError: a field is refused; the message names it.
    """

    source: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    batch_size: int = Field(default=32, ge=1, lt=2**31)
    shuffle: bool = True
    drop_last: bool = False
    seed: int = Field(default=0, ge=0, lt=2**63)
    num_workers: int = Field(default=0, ge=0, le=256)
    resident: bool | None = None
    augment: str | None = None
    augment_kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("source", "augment")
    @classmethod
    def _callables(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is not None and not callable(resolve(path, field=str(info.field_name))):
            raise ValueError(f"{path!r} is not callable")
        return path

    @field_validator("kwargs", "augment_kwargs")
    @classmethod
    def _kwargs(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        return canonical_json(kwargs, what="kwargs")

    @model_validator(mode="after")
    def _augmentation(self) -> DataSpec:
        if self.augment is None and self.augment_kwargs:
            raise ValueError("augment_kwargs: given without an augment")
        return self

    @property
    def digest(self) -> str:
        """Equal for equal specs; names the loader in a graph."""
        return digest_of(as_json(self))


#: Fields that came after journals were written, and their defaults.
LATER_FIELDS: dict[type, dict[str, Any]] = {
    DataSpec: {"resident": None, "augment": None, "augment_kwargs": {}}
}


@raising(SpecError)
@dataclass(frozen=True, config=_CONFIG)
class TrainingSpec:
    """How one model is trained.

    Args:
        loss: A `torch.nn.functional` name ("cross_entropy") or import path of
            `loss(output, target) -> scalar`.
        metrics: Names ("accuracy", "f1_score", "mean_squared_error"; docs/metrics.md says what each
            computes and for which losses) or import paths of callables returning a
            `torchmetrics.Metric`. The first is the model's metric; with none it is `val_loss`.
        metric_mode: "max" or "min"; unset, the metric's own `higher_is_better` decides.
        optimizer: A `torch.optim` class name or import path.
        optimizer_kwargs: JSON keyword arguments.
        scheduler: A `torch.optim.lr_scheduler` class name or import path, or None.
        scheduler_kwargs: JSON keyword arguments.
        scheduler_interval: "epoch" or "step".
        epochs: Passes over the training data.
        grad_clip_norm: Maximum 2-norm of this model's own gradients, or None.
        precision: "float32", "float64" (module, floating inputs and targets cast), "bfloat16"
            (autocast) or "float16" (autocast, with the model's own dynamic loss scale: that of
            `torch.amp.GradScaler`, which leaves out steps whose gradients overflow).
        loss_scale: The scale that float16 starts with; None is GradScaler's own, 65536.
        loss_scale_growth_interval: Steps without overflow after which the scale doubles.
        stop_on_nan: End the model, as failed, after the epoch in which its training loss became
            NaN or infinite.

    Raises:
        SpecError: a field is refused; the message names it.
    """

    loss: str = "cross_entropy"
    metrics: tuple[str, ...] = ()
    optimizer: str = "SGD"
    optimizer_kwargs: dict[str, Any] = Field(default_factory=dict)
    scheduler: str | None = None
    scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    scheduler_interval: Literal["epoch", "step"] = "epoch"
    epochs: int = Field(default=1, ge=1, lt=2**31)
    grad_clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    loss_scale: float | None = Field(default=None, gt=0, le=2.0**127)  # float32's largest power
    loss_scale_growth_interval: int = Field(default=2000, ge=1, lt=2**31)
    metric_mode: Literal["max", "min"] | None = None
    stop_on_nan: bool = True

    @field_validator("optimizer_kwargs", "scheduler_kwargs")
    @classmethod
    def _kwargs(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        return canonical_json(kwargs, what="values")

    @field_validator("loss")
    @classmethod
    def _loss(cls, loss: str) -> str:
        loss_function(loss)
        return loss

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, metrics: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        from cgo.metrics import check_metric

        for name in metrics if "loss" in info.data else ():  # else the loss itself is refused
            check_metric(name, info.data["loss"])
        if len(set(metrics)) < len(metrics):
            raise ValueError("a metric is named twice")
        return metrics

    @model_validator(mode="after")
    def _classes(self) -> TrainingSpec:
        _check_signature("optimizer", optimizer_class(self.optimizer), self.optimizer_kwargs)
        if self.scheduler is not None:
            _check_signature("scheduler", scheduler_class(self.scheduler), self.scheduler_kwargs)
        elif self.scheduler_kwargs:
            raise ValueError("scheduler_kwargs: given without a scheduler")
        return self

    @model_validator(mode="after")
    def _scale(self) -> TrainingSpec:
        if self.precision != "float16":
            for name, default in (("loss_scale", None), ("loss_scale_growth_interval", 2000)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: only for precision 'float16'")
        return self

    @property
    def autocast_dtype(self) -> str | None:
        """The dtype of the autocast region that the model runs in, if any."""
        return self.precision if self.precision in ("bfloat16", "float16") else None

    @property
    def metric_name(self) -> str:
        """The history column that is *the* metric: `val_<first metric>` or `val_loss`."""
        return f"val_{metric_label(self.metrics[0])}" if self.metrics else "val_loss"

    @property
    def mode(self) -> str:
        """Whether a better metric is larger ("max") or smaller ("min")."""
        from cgo.metrics import higher_is_better

        if self.metric_mode is not None:
            return self.metric_mode
        return "max" if self.metrics and higher_is_better(self.metrics[0]) else "min"


def metric_label(name: str) -> str:
    """A metric's name in history columns: of an import path, what follows the colon."""
    return name.rpartition(":")[2]


def loss_function(loss: str) -> Callable[[Any, Any], torch.Tensor]:
    """The callable a `TrainingSpec.loss` names.

    Raises:
        SpecError: there is no such function.
    """
    if is_import_path(loss):
        found = resolve(loss, field="loss")
    else:
        import torch.nn.functional

        # No other name is looked up: the module holds more than its functions.
        found = getattr(torch.nn.functional, loss, None) if loss in LOSSES else None
    if not callable(found):
        raise SpecError(
            f"loss: {loss!r} is neither a torch.nn.functional function nor 'package.module:name'"
        )
    return found


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class a `TrainingSpec.optimizer` names.

    Raises:
        SpecError: there is none, or it cannot be used here.
    """
    import torch

    return _torch_class("optimizer", name, torch.optim, torch.optim.Optimizer, REFUSED_OPTIMIZERS)


def scheduler_class(name: str) -> type[torch.optim.lr_scheduler.LRScheduler]:
    """The class a `TrainingSpec.scheduler` names.

    Raises:
        SpecError: there is none, or it cannot be used here.
    """
    from torch.optim import lr_scheduler

    return _torch_class(
        "scheduler", name, lr_scheduler, lr_scheduler.LRScheduler, REFUSED_SCHEDULERS
    )


def _torch_class(field: str, name: str, module: Any, base: type, refused: Mapping[str, str]) -> Any:
    found = resolve(name, field=field) if is_import_path(name) else vars(module).get(name)
    if inspect.isclass(found):
        for parent in found.__mro__:
            if parent.__name__ in refused:
                raise SpecError(f"{field}: {name} cannot be used: {refused[parent.__name__]}")
        if issubclass(found, base) and found is not base:
            return found
    elif callable(found) and is_import_path(name):
        return found
    raise SpecError(
        f"{field}: {name!r} is neither a class of {module.__name__} nor 'package.module:name'"
    )


def _check_signature(field: str, found: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(found).bind(None, **kwargs)
    except TypeError as error:
        raise SpecError(f"{field}_kwargs: {found.__name__}: {error}") from error


def as_json(spec: DataSpec | TrainingSpec) -> dict[str, Any]:
    """A spec as JSON values; fields that came later are left out where they are at their default.

    So the digests of older specs stay, by which a journal finds its results.
    """
    values = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    later = LATER_FIELDS.get(type(spec), {})
    kept = {k: v for k, v in values.items() if k not in later or v != later[k]}
    return canonical_json(kept, what="a spec")


def digest_of(value: Any) -> str:
    """A short content hash of JSON values."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ModelStatus(str, Enum):
    """Where a model stands; the last three are final."""

    SUBMITTED = "submitted"
    TRAINING = "training"
    TRAINED = "trained"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the model."""
        return self in (ModelStatus.TRAINED, ModelStatus.FAILED, ModelStatus.CANCELLED)


class Model:
    """One candidate of a search.

    Args:
        module: "package.module:callable", called with `kwargs` right after
            `torch.manual_seed(seed)`; or an `nn.Module`, whose present weights are the start.
        kwargs: JSON keyword arguments of the factory.
        data: Where its batches come from.
        training: How it is trained.
        seed: Seed of its initial weights and of its random stream.
        model_id: Unique within an experiment; letters, digits, `_`, `.` and `-`. Unset, it follows
            from the other arguments, and from how many equal models this process has made before:
            a script that is run again names its models as before.

    Attributes:
        model_id: The id given, or one made of the content.
        status: A `ModelStatus`.
        metric: The last epoch's first metric on validation data; None until trained.
        intermediate_metrics: That metric, epoch by epoch.
        history: One mapping an epoch: `train_loss`, `val_loss` (means over samples),
            `val_<metric>`, `lr`, `seconds`.
        error: Why it failed, or None.

    Raises:
        SpecError: an argument is refused; the message names it.
    """

    def __init__(
        self,
        module: str | nn.Module,
        kwargs: Mapping[str, Any] | None = None,
        *,
        data: DataSpec,
        training: TrainingSpec,
        seed: int = 0,
        model_id: str | None = None,
    ) -> None:
        if not isinstance(data, DataSpec):
            raise SpecError(f"Model: data: expected a DataSpec, got {type(data).__name__}")
        if not isinstance(training, TrainingSpec):
            raise SpecError(
                f"Model: training: expected a TrainingSpec, got {type(training).__name__}"
            )
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise SpecError(f"Model: seed: expected an integer from 0 below 2**63, got {seed!r}")
        self.module = _checked_module(module, kwargs)
        try:
            self.kwargs: dict[str, Any] = canonical_json(dict(kwargs or {}), what="kwargs")
        except ValueError as error:
            raise SpecError(f"Model: {error}") from error
        if model_id is None:
            model_id = _fresh_id(self.module, self.kwargs, data, training, seed)
        self.model_id = checked_id(model_id, "Model: model_id")
        self.data = data
        self.training = training
        self.seed = seed
        self.status = ModelStatus.SUBMITTED
        self.metric: float | None = None
        self.intermediate_metrics: list[float] = []
        self.history: list[dict[str, float]] = []
        self.error: str | None = None
        self._load_state: Callable[[], dict[str, torch.Tensor]] | None = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The trained weights under the module's own names, on the CPU.

        Raises:
            SpecError: the model has not been trained.
        """
        if self._load_state is None:
            raise SpecError(
                f"model {self.model_id!r} is {self.status.value}: it has no weights yet"
            )
        return self._load_state()

    def copy(self) -> Model:
        """A snapshot that later events do not change; shares the module."""
        other = copy.copy(self)
        other.intermediate_metrics = list(self.intermediate_metrics)
        other.history = [dict(row) for row in self.history]
        return other

    def __repr__(self) -> str:
        name = self.module if isinstance(self.module, str) else type(self.module).__name__
        status = self.status.value
        return f"Model({name!r}, model_id={self.model_id!r}, {status}, metric={self.metric})"


#: How many models of a content this process has made without an id.
_MADE: Counter[str] = Counter()


def _fresh_id(
    module: str | nn.Module,
    kwargs: Mapping[str, Any],
    data: DataSpec,
    training: TrainingSpec,
    seed: int,
) -> str:
    """An id that the same script gives again.

    Models are merged in the order of their ids, and what is computed must not depend on chance.
    An instance's weights may be another search's, so its id is new all the same.
    """
    name = module if isinstance(module, str) else type(module).__qualname__
    content = digest_of([name, kwargs, as_json(data), as_json(training), seed])[:12]
    _MADE[content] += 1
    number = f"-{_MADE[content]}" if _MADE[content] > 1 else ""
    return f"{content}{number}" + ("" if isinstance(module, str) else f"-{uuid.uuid4().hex[:8]}")


def _checked_module(module: Any, kwargs: Mapping[str, Any] | None) -> str | nn.Module:
    if isinstance(module, str):
        try:
            found = resolve(module, field="module")
        except SpecError as error:
            raise SpecError(f"Model: {error}") from error
        if not callable(found):
            raise SpecError(f"Model: module: {module!r} is not callable")
        return module
    from torch import nn

    if not isinstance(module, nn.Module):
        raise SpecError(
            "Model: module: expected 'package.module:callable' or an nn.Module, "
            f"got {type(module).__name__}"
        )
    if kwargs:
        raise SpecError("Model: kwargs: an nn.Module instance takes none; give a factory")
    return module


def best(models: Iterable[Model]) -> Model | None:
    """The model with the best metric, by the models' `metric_mode`; None if none has one.

    Raises:
        SpecError: the models' modes differ, so no order is defined.
    """
    rated = [model for model in models if model.metric is not None and model.metric == model.metric]
    modes = {model.training.mode for model in rated}
    if len(modes) > 1:
        raise SpecError("best: some models' metrics are to be maximised, others minimised")
    if not rated:
        return None
    choose = max if modes == {"max"} else min
    return choose(rated, key=lambda model: float(model.metric or 0.0))
