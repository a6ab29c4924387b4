"""From NNI's frozen models and evaluators to ours.

What cannot be translated is no error: the model then runs as NNI would run it, by itself, and the
reason is kept for `CGOExecutionEngine.explain`.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nni
import torch
from nni.common.serializer import is_traceable
from nni.nas.evaluator.evaluator import FrozenEvaluator
from nni.nas.space import (
    ExecutableModelSpace,
    GraphModelSpace,
    RawFormatModelSpace,
    SimplifiedModelSpace,
)
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from cgo import weights
from cgo.errors import CgoError, SpecError
from cgo.graph import ModelId
from cgo.graph_data import file_sha256
from cgo.metrics import check_metric
from cgo.model import DataSpec, Model, TrainingSpec

#: Losses that NNI's evaluators name by their class.
LOSSES: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.MSELoss: "mse_loss",
    nn.L1Loss: "l1_loss",
    nn.SmoothL1Loss: "smooth_l1_loss",
    nn.HuberLoss: "huber_loss",
    nn.NLLLoss: "nll_loss",
    nn.BCELoss: "binary_cross_entropy",
    nn.BCEWithLogitsLoss: "binary_cross_entropy_with_logits",
    nn.KLDivLoss: "kl_div",
    nn.SoftMarginLoss: "soft_margin_loss",
}

#: Evaluators by name, with the metric that each reports.
METRICS = {"Classification": "accuracy", "Regression": "mean_squared_error"}

#: Arguments of Lightning's trainer that change where and how loudly it trains, not what.
HARMLESS = frozenset(
    """
    accelerator strategy devices num_nodes logger enable_checkpointing enable_progress_bar
    enable_model_summary default_root_dir num_sanity_val_steps log_every_n_steps deterministic
    benchmark detect_anomaly barebones profiler inference_mode use_distributed_sampler
    """.split()  # noqa: SIM905
)


class NotTranslated(CgoError):
    """A model that runs unmerged; the message says why."""


class Translator:
    """Makes `cgo.Model`s of NNI's frozen models.

    Args:
        folder: Where data sets that are given as tensors are stored, for trials to read.
        seed: Added to every model's seed.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self._folder, self._seed = folder, seed
        # By identity; the values keep the data sets alive, so that ids stay theirs.
        self._stored: dict[tuple[int, int], tuple[Any, str, dict[str, Any]]] = {}

    def model(self, space: ExecutableModelSpace, name: Callable[[str], ModelId]) -> Model:
        """One model.

        A candidate's seed follows from what it is, so that a search that goes on from its journal
        finds it there.

        Args:
            space: A frozen one.
            name: Makes an id of a text that is equal for equal candidates.

        Raises:
            NotTranslated: space or evaluator are of no kind that can be merged.
        """
        data, training = self._evaluator(space.evaluator)
        described = _described(space)
        seed = self._seed + int(_digest(described)[:8], 16)
        module, kwargs = _module(space, seed)
        model_id = name(_digest(repr((described, data, training, seed))))
        return Model(module, kwargs, data=data, training=training, seed=seed, model_id=model_id)

    def _evaluator(self, evaluator: Any) -> tuple[DataSpec, TrainingSpec]:
        name, given = _arguments(evaluator)
        if name not in METRICS:
            raise NotTranslated(
                f"evaluator {name}: only {' and '.join(METRICS)} can be merged, others are opaque "
                "functions"
            )
        fields, metric = _training(given), METRICS[name]
        try:
            check_metric(metric, fields["loss"])
        except SpecError as error:  # a Classification by a criterion of numbers, or the other way
            raise NotTranslated(f"evaluator: {error}") from error
        return self._data(given), TrainingSpec(metrics=(metric,), **fields)

    def _data(self, given: Mapping[str, Any]) -> DataSpec:
        train = _instance(given.get("train_dataloaders") or given.get("train_dataloader"))
        validation = _instance(given.get("val_dataloaders"))
        if given.get("datamodule") is not None:
            raise NotTranslated(
                "evaluator: a datamodule; give train_dataloaders and val_dataloaders"
            )
        for what, loader in (("train_dataloaders", train), ("val_dataloaders", validation)):
            if not isinstance(loader, DataLoader):
                raise NotTranslated(
                    f"evaluator: {what} is a {type(loader).__name__}, no DataLoader"
                )
            if loader.collate_fn is not default_collate:
                raise NotTranslated(f"evaluator: {what} has a collate_fn of its own")
        if train.batch_size is None:
            raise NotTranslated("evaluator: train_dataloaders has a batch_sampler")
        if type(train.sampler) not in (RandomSampler, SequentialSampler):
            raise NotTranslated(f"evaluator: sampler {type(train.sampler).__name__}")
        source, kwargs = self._source(train.dataset, validation.dataset)
        return DataSpec(
            source,
            kwargs,
            batch_size=train.batch_size,
            shuffle=isinstance(train.sampler, RandomSampler),
            drop_last=train.drop_last,
            num_workers=train.num_workers,
        )

    def _source(self, train: Any, validation: Any) -> tuple[str, dict[str, Any]]:
        """Data sets by reference: what made them, or a file of their tensors."""
        if is_traceable(train) and is_traceable(validation):
            return "cgo.nni.data:traced", {
                "train": nni.dump(train),
                "validation": nni.dump(validation),
            }
        key = id(train), id(validation)
        if key not in self._stored:
            tensors = {f"train.{i}": t for i, t in enumerate(_tensors(train))}
            tensors |= {f"validation.{i}": t for i, t in enumerate(_tensors(validation))}
            content = _digest("".join(map(weights.tensor_hash, tensors.values())))
            path = self._folder.resolve() / f"{content}.safetensors"
            if not path.exists():
                weights.save(path, tensors)
            kwargs = {"file": str(path), "sha256": file_sha256(path)}
            self._stored[key] = (train, validation), "cgo.nni.data:stored", kwargs
        _, source, kwargs = self._stored[key]
        return source, kwargs


def _arguments(evaluator: Any) -> tuple[str, dict[str, Any]]:
    """An evaluator's class and the arguments that it was, or will be, made with."""
    if evaluator is None:
        raise NotTranslated("the model has no evaluator")
    symbol = getattr(evaluator, "trace_symbol", type(evaluator))
    name = getattr(symbol, "__name__", str(symbol))
    if isinstance(evaluator, FrozenEvaluator):
        source = evaluator.frozen_obj
    elif is_traceable(evaluator):
        source = evaluator
    else:
        return name, {}
    module = getattr(symbol, "__module__", "")
    if name in METRICS and not module.startswith("nni.nas.evaluator.pytorch"):
        name = f"{module}.{name}"
    if not source.trace_args:
        return name, dict(source.trace_kwargs)
    bound = inspect.signature(symbol).bind(*source.trace_args, **source.trace_kwargs)
    given = dict(bound.arguments)
    return name, given | given.pop("trainer_kwargs", {})


#: Arguments of the evaluators themselves; what remains goes to the trainer.
_OWN = frozenset(
    """
    criterion learning_rate weight_decay optimizer train_dataloaders val_dataloaders datamodule
    export_onnx train_dataloader num_classes
    """.split()  # noqa: SIM905
)


def _training(given: Mapping[str, Any]) -> dict[str, Any]:
    trainer = {key: value for key, value in given.items() if key not in _OWN}
    epochs = trainer.pop("max_epochs", None)
    if not isinstance(epochs, int) or epochs < 1:
        raise NotTranslated(f"evaluator: max_epochs is {epochs}; give a number of epochs")
    norm = trainer.pop("gradient_clip_val", None)
    if trainer.pop("gradient_clip_algorithm", None) not in (None, "norm"):
        raise NotTranslated("evaluator: gradient_clip_algorithm is not 'norm'")
    precision = _precision(trainer.pop("precision", None))
    if unknown := sorted(key for key, value in trainer.items() if key not in HARMLESS and value):
        raise NotTranslated(f"evaluator: trainer arguments {', '.join(unknown)}")
    classification = "num_classes" in given
    criterion = given.get("criterion", nn.CrossEntropyLoss if classification else nn.MSELoss)
    if criterion not in LOSSES:
        raise NotTranslated(f"evaluator: criterion {getattr(criterion, '__name__', criterion)}")
    return {
        "loss": LOSSES[criterion],
        "optimizer": _optimizer(given.get("optimizer", torch.optim.Adam)),
        "optimizer_kwargs": {
            "lr": float(given.get("learning_rate", 0.001)),
            "weight_decay": float(given.get("weight_decay", 0.0)),
        },
        "epochs": epochs,
        "grad_clip_norm": norm or None,
        "precision": precision,
    }


def _precision(given: Any) -> str:
    names = {None: "float32", 32: "float32", "32": "float32", "32-true": "float32",
             64: "float64", "64": "float64", "64-true": "float64",
             "bf16": "bfloat16", "bf16-mixed": "bfloat16"}  # fmt: skip
    if given not in names:
        raise NotTranslated(f"evaluator: precision {given!r}")
    return names[given]


def _optimizer(kind: Any) -> str:
    name = str(getattr(kind, "__name__", kind))
    if getattr(torch.optim, name, None) is kind:
        return name
    return f"{getattr(kind, '__module__', '')}:{name}"


def _instance(loader: Any) -> Any:
    """A loader, made now if the evaluator has kept only its arguments."""
    return FrozenEvaluator.recursive_instantiate(loader)


def _tensors(dataset: Dataset[Any]) -> list[torch.Tensor]:
    """The tensors of a data set that holds nothing else."""
    if isinstance(dataset, TensorDataset):
        return [tensor.detach().cpu() for tensor in dataset.tensors]
    if isinstance(dataset, Subset):
        index = torch.as_tensor(list(dataset.indices))
        return [tensor[index] for tensor in _tensors(dataset.dataset)]
    raise NotTranslated(
        f"evaluator: data set {type(dataset).__name__}: wrap its class with nni.trace, so that a "
        "trial can make it, or give a TensorDataset"
    )


def _module(space: ExecutableModelSpace, seed: int) -> tuple[str | nn.Module, dict[str, Any]]:
    """How a trial gets the network: made from the space, or sent with its weights."""
    if isinstance(space, (SimplifiedModelSpace, GraphModelSpace)):
        return "cgo.nni.spaces:build", {"space": _described(space)}
    if isinstance(space, RawFormatModelSpace):
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        try:
            return space.executable_model(), {}
        finally:
            torch.random.set_rng_state(state)
    raise NotTranslated(f"space {type(space).__name__}")


def _described(space: ExecutableModelSpace) -> str:
    """A space as text, without evaluator and metrics: equal for equal candidates."""
    if isinstance(space, SimplifiedModelSpace):
        bare = SimplifiedModelSpace(space.model, {}, None)
        bare.status, bare.sample = type(space.status).Frozen, space.sample
        return str(nni.dump(bare))
    if isinstance(space, GraphModelSpace):
        shell = copy.copy(space)
        shell.evaluator = shell.placement = None  # its data sets are no part of the network
        document = json.loads(nni.dump(shell))
        document.pop("model_id", None)
        return json.dumps(document, sort_keys=True)
    return json.dumps(getattr(space, "sample", None), sort_keys=True, default=str)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
