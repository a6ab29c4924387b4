"""Small real documents, and ways of making them wrong, for the fuzzer.

What documents name is code, which checks its own arguments: nothing else could. So the factories
and sources here refuse sizes that a test cannot afford.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import cgo
from cgo.errors import CgoError
from cgo.events import Event, checked
from cgo.graph_data import GraphData
from cgo.planner import Planner
from cgo.runtime.watching import Limits
from cgo.trial import execute

#: What a fuzzed document's operators may take: seconds of one core, and little memory.
LIMITS = Limits(tensor_bytes=2**24, inner_bytes=2**25, flops=2**30, calls=20_000, graph_bytes=2**26)

MOST = 64


def bounded(**sizes):
    """Raise unless all sizes are small whole numbers."""
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= MOST:
            raise ValueError(f"{name} {size!r:.40} is no number from 1 to {MOST}")


def _split(x, classes=3):
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, classes, (len(x),), generator=generator)
    return TensorDataset(x[:8], y[:8]), TensorDataset(x[8:], y[8:])


def points(features=6):
    """Eight points to train on and four to validate with."""
    bounded(features=features)
    return _split(torch.randn(12, features, generator=torch.Generator().manual_seed(2)))


def images(size=6):
    """The same of images with one channel."""
    bounded(size=size)
    return _split(torch.randn(12, 1, size, size, generator=torch.Generator().manual_seed(3)))


def tokens(length=5):
    """The same of texts of eleven words."""
    bounded(length=length)
    return _split(torch.randint(0, 11, (12, length), generator=torch.Generator().manual_seed(4)))


def mlp(hidden=4, dropout=0.2):
    bounded(hidden=hidden)
    return nn.Sequential(
        nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(hidden, 3),
    )  # fmt: skip


def cnn(width=2, stride=1):
    bounded(width=width, stride=stride)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(width, width, 3, padding=1, groups=width), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )  # fmt: skip


#: A tensor that is no parameter or buffer of anything: a constant of the document.
POSITIONS = torch.arange(MOST) / 10


class Reader(nn.Module):
    """Embedding, attention, layer norm; with tied weights and a table of constants."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 11, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(11, 3)

    def forward(self, x):
        h = self.embed(x)
        h = h + POSITIONS[: h.shape[1], None]
        h = self.norm(h + self.attend(h, h, h, need_weights=False)[0])
        return self.head(self.out(h).mean(1))


def reader(width=4):
    bounded(width=width)
    return Reader(width)


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.steps = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.steps(self.embed(x))[0][:, -1])


def recurrent(width=3):
    bounded(width=width)
    return Recurrent(width)


class Frozen(nn.Module):
    """A frozen stem under a head; the same stem in every model."""

    def __init__(self, hidden):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(9)
            self.stem = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).requires_grad_(False)
        self.head = nn.Linear(5, hidden)
        self.last = nn.Linear(hidden, 3)

    def forward(self, x):
        return self.last(F.softplus(self.head(self.stem(x))))


def frozen(hidden=4):
    bounded(hidden=hidden)
    return Frozen(hidden)


class Decides(nn.Module):
    """Reads a value to decide, so that it becomes an opaque lane."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        out = self.body(x)
        return out * 2 if float(out.detach().sum()) > 0 else out


def decides():
    return Decides(nn.Linear(6, 3))


def lazily_decides():
    return Decides(nn.LazyLinear(3))


def lazy(hidden=4):
    """Its first call makes its first layer, and a document has a file of what that drew."""
    bounded(hidden=hidden)
    return nn.Sequential(nn.LazyLinear(hidden), nn.Tanh(), nn.Linear(hidden, 3))


class Chebyshev(nn.Module):
    """Its operator may not stand in a document: it takes as long as a number says."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 3)

    def forward(self, x):
        return self.body(torch.special.chebyshev_polynomial_t(x, 2))


def chebyshev():
    return Chebyshev()


def noise(scale=0.1):
    """An augmentation."""

    class Noise(nn.Module):
        def forward(self, x):
            return x + scale * torch.randn_like(x)

    return Noise()


# --- documents --------------------------------------------------------------------------------

HERE = "support.hostile"


def _model(id_, factory, kwargs=None, data="points", seed=0, spec=(), **training):
    data = cgo.DataSpec(f"{HERE}:{data}", batch_size=4, **dict(spec))
    module = f"{HERE}:{factory}" if isinstance(factory, str) else factory
    given = cgo.TrainingSpec(**{"optimizer_kwargs": {"lr": 0.01}} | training)
    return cgo.Model(module, kwargs, data=data, training=given, seed=seed, model_id=id_)


def families() -> dict[str, list[cgo.Model]]:
    """Models of each document: fused, shared, opaque, lazy, with files, of two data sets."""
    torch.manual_seed(0)
    momentum = {"optimizer_kwargs": {"lr": 0.01, "momentum": 0.9}}
    return {
        "points": [
            _model("a", "mlp"), _model("b", "mlp", seed=1, **momentum),
            _model("c", "mlp", {"hidden": 4}),
        ],
        "stems": [
            _model("a", "frozen", metrics=("accuracy",)),
            _model("b", "frozen", {"hidden": 3}, optimizer="Adam"), _model("o", "decides"),
        ],
        "images": [
            _model("a", "cnn", data="images"),
            _model("b", "cnn", {"stride": 2}, data="images", optimizer="AdamW", seed=3,
                   scheduler="StepLR", scheduler_kwargs={"step_size": 1}),
        ],
        "tokens": [
            _model("a", "reader", data="tokens", grad_clip_norm=1.0),
            _model("b", "recurrent", data="tokens", precision="float64"),
        ],
        "lazy": [
            _model("a", "lazy"), _model("b", "lazy", seed=1), _model("o", "lazily_decides"),
        ],
        "files": [
            _model("a", mlp(3), spec={"seed": 1}), _model("b", mlp(3), spec={"seed": 1}),
            _model("p", "mlp", precision="bfloat16",
                   spec={"augment": f"{HERE}:noise", "augment_kwargs": {"scale": 0.5}}),
        ],
    }  # fmt: skip


def write_documents(folder: Path) -> dict[str, Any]:
    """Each family's document as JSON values; its files lie in a folder of the family's name."""
    found = {}
    tuning = cgo.Tuning(measure=False).as_json()
    for name, models in families().items():
        plan = Planner().plan(models, folder / name, {"name": "fuzz", "tuning": tuning})
        assert plan.graph_data is not None, plan.failures
        assert not plan.failures
        found[name] = json.loads(plan.graph_data.to_json())
    return found


# --- what is made of one ----------------------------------------------------------------------


class Told(list[Event]):
    """Events, each of which the engine's reader would take."""

    def report(self, event: Event) -> None:
        self.append(checked(event))


def run(text: str, base: Path, folder: Path) -> Told | CgoError:
    """Read a document and train what it holds for an epoch: what was told, or our own error.

    Anything else that is raised is what the fuzzer looks for.
    """
    told = Told()
    try:
        data = tamed(GraphData.from_json(text, base=base))
        execute(data, folder=folder, report=told.report, limits=LIMITS)
    except CgoError as error:
        str(error).encode()
        return error
    ended = [event.model for event in told if event.kind == "ended"]
    assert sorted(ended) == sorted(model.id for model in data.models)
    for event in told:
        if event.kind == "ended" and event.value["success"]:
            path = (folder / event.value["weights"]).resolve()
            assert path.is_file()
            assert folder.resolve() in path.parents
    return told


def tamed(data: GraphData) -> GraphData:
    """The same document for one epoch, without processes of its own and without a C++ compiler."""
    from dataclasses import replace

    models = tuple(
        replace(model, training=replace(model.training, epochs=1)) for model in data.models
    )
    specs = {key: replace(spec, num_workers=0) for key, spec in data.data.items()}
    experiment = copy.deepcopy(dict(data.experiment))
    if isinstance(tuning := experiment.get("tuning"), dict) and "compile" in tuning:
        tuning["compile"] = None
    return replace(data, models=models, data=specs, experiment=experiment)


# --- mutations --------------------------------------------------------------------------------

INTS = [-(2**63), -1, 0, 1, 2, 3, 4, 7, 2**15, 2**31 - 1, 2**31, 2**40, 2**60, 2**63 - 1, 2**63,
        2**64, 10**30]  # fmt: skip
FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 1e-320, 1e300, 1e308, float("nan"), float("inf")]
TEXTS = [
    "", "a", "b", "train", "train/4", "validation/4", "a/train/4/x", "input", "target", "input.0",
    "\0", "\n", "\x1b[31m", "\ud800", "\u202e", "é", "x" * 300, "x" * 3000, "../../x", "/x",
    "C:\\x", "CON", ".", "..", "load", "float32", "int64", "bool", "complex64", "quint8", "inf",
    "cpu", "cuda", "trial", "loss", "prediction", "update", "cross_entropy", "SGD", "Adam", "Muon",
    "LBFGS", "Adafactor", "OneCycleLR", "CosineAnnealingLR", "LambdaLR", "accuracy", "f1_score",
    "mse_loss", "ctc_loss", "os:abort", "os:system", "torch:load", f"{HERE}:mlp", f"{HERE}:points",
    f"{HERE}:run", f"{HERE}:nothing", "no.such:module", "import os", "1e999", "step", "epoch",
    "float16", "bfloat16", "float64", "max", "inductor", "stacked", "channels",
]  # fmt: skip
#: What stands for these in the values, and is put into the text of the document.
MARKS = {
    "@infinite@": "1e999",  # which Python's json reads as infinite
    **{f"@deep{n}@": "[" * n + "1" + "]" * n for n in (3, 40, 90, 2000)},
}


def literal(dice: Random) -> Any:
    """Any JSON value, often an extreme one."""
    kinds: list[Callable[[], Any]] = [
        lambda: dice.choice(INTS), lambda: dice.randint(-5, 20), lambda: dice.choice(FLOATS),
        lambda: dice.choice(TEXTS), lambda: dice.choice([True, False, None]),
        lambda: [], lambda: {}, lambda: [dice.choice(INTS) for _ in range(dice.randint(1, 4))],
        lambda: dice.choice(list(MARKS)),
        lambda: {dice.choice(TEXTS): dice.choice(INTS)},
        lambda: {"float": dice.choice(["inf", "-inf", "nan", "1"])},
        lambda: {"symbol": [dice.choice(["dtype", "layout", "memory_format", "device", "load"]),
                            dice.choice(["float32", "int64", "strided", "trial", "load",
                                         "channels_last", "bool", "float16"])]},
    ]  # fmt: skip
    return dice.choice(kinds)()


def like(value: Any, dice: Random) -> Any:
    """Another value of the same type."""
    if type(value) is bool:
        return not value
    if type(value) is int:
        return dice.choice([value + 1, value - 1, -value, value * 2, value * 1000])
    if type(value) is float:
        return dice.choice([value * 2, -value, value + 1, 0.0, 1.0])
    if type(value) is str:
        return dice.choice([*TEXTS, value + "x", value[:-1], value.upper(), value * 40])
    if type(value) is list:
        return dice.choice([value[1:], value * 2, value[::-1], [*value, literal(dice)]])
    if type(value) is dict:
        kept = dict(value)
        if kept and dice.random() < 0.5:
            del kept[dice.choice(list(kept))]
        else:
            kept[dice.choice(TEXTS)] = literal(dice)
        return kept
    return literal(dice)


def places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    items: Any = ()
    if isinstance(value, dict):
        items = list(value)
    elif isinstance(value, list):
        items = range(len(value))
    for key in items:
        yield value, key
        if depth < 60:
            yield from places(value[key], depth + 1)


def _section(document: Any, dice: Random) -> Any:
    """One part of the document; each as likely, whatever its size."""
    names = ["models", "data", "nodes", "nodes", "nodes", "outputs", "aliases", "experiment"]
    found = document.get(dice.choice(names)) if isinstance(document, dict) else document
    while isinstance(found, (list, dict)) and found and dice.random() < 0.9:
        values = found if isinstance(found, list) else list(found.values())
        inner = dice.choice(values)
        if not isinstance(inner, (list, dict)):
            break
        found = inner
    return found


def change_anywhere(document: Any, dice: Random) -> None:
    """Replace, delete, double, move or add something."""
    part = _section(document, dice)
    if isinstance(part, dict):
        keys: list[Any] = list(part)
    elif isinstance(part, list):
        keys = list(range(len(part)))
    else:
        return
    if not keys or dice.random() < 0.1:
        if isinstance(part, dict):
            part[dice.choice(TEXTS)] = literal(dice)
        else:
            part.append(literal(dice))
        return
    key, other = dice.choice(keys), dice.choice(keys)
    match dice.randrange(6):
        case 0:
            part[key] = literal(dice)
        case 1 | 2:
            part[key] = like(part[key], dice)
        case 3:
            del part[key]
        case 4:
            part[key], part[other] = part[other], part[key]
        case 5 if isinstance(part, list):
            part.insert(dice.randint(0, len(part)), copy.deepcopy(part[key]))


def _nodes(document: Any) -> list[Any]:
    nodes = document.get("nodes") if isinstance(document, dict) else None
    if not isinstance(nodes, list):
        return []
    return [node for node in nodes if isinstance(node, dict) and isinstance(node.get("op"), str)]


def change_operator(document: Any, dice: Random, operators: list[str]) -> None:
    """Another operator with the same arguments, or one of its literals changed."""
    nodes = [node for node in _nodes(document) if node["op"].startswith("aten.")]
    if not nodes:
        return
    node = dice.choice(nodes)
    args = node.setdefault("args", [])
    if not isinstance(args, list):
        return
    match dice.randrange(5):
        case 0 | 1:
            node["op"] = dice.choice(operators)
        case 2 if args:
            index = dice.randrange(len(args))
            args[index] = literal(dice) if dice.random() < 0.5 else like(args[index], dice)
        case 3:
            args.insert(dice.randint(0, len(args)), literal(dice))
        case 4 if isinstance(node.get("kwargs", {}), dict):
            name = dice.choice(["dim", "eps", "alpha", "size", "keepdim", "dtype", "momentum"])
            node.setdefault("kwargs", {})[name] = literal(dice)


def change_numbers(document: Any, dice: Random) -> None:
    """Numbers of operators that may well run: a stride, a kernel, a scale, a number of repeats."""
    found = [
        (part, key)
        for node in _nodes(document)
        for part, key in places([node.get("args"), node.get("kwargs")])
        if type(part[key]) in (int, float) and not isinstance(part, dict)
    ]
    for part, key in dice.sample(found, min(len(found), 2)):
        part[key] = like(part[key], dice) if dice.random() < 0.6 else dice.choice(INTS)


def change_reference(document: Any, dice: Random) -> None:
    """Read another node."""
    names = [node.get("name") for node in _nodes(document)]
    found = [
        part[key]["ref"]
        for part, key in places([document.get("nodes"), document.get("outputs")])
        if isinstance(part[key], dict) and isinstance(part[key].get("ref"), list)
    ]
    if found and names:
        reference = dice.choice(found)
        if reference:
            reference[0] = dice.choice(names)


def change_type(document: Any, dice: Random) -> None:
    """Another shape, dtype or stride of a node's result."""
    found = [
        type_
        for node in _nodes(document)
        for type_ in (node["types"] if isinstance(node.get("types"), list) else [])
        if isinstance(type_, dict)
    ]
    if not found:
        return
    type_ = dice.choice(found)
    match dice.randrange(3):
        case 0:
            type_["dtype"] = dice.choice(["float64", "int64", "bool", "complex64", "load", "uint8"])
        case 1:
            type_["shape"] = like(type_.get("shape"), dice)
        case 2:
            type_["stride"] = [dice.choice(INTS) for _ in type_.get("shape", [])]


OPTIONS: dict[str, list[Any]] = {
    "optimizer": ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam",
                  "RAdam", "Rprop", "ASGD", "Muon", "Adafactor", "SparseAdam", "LBFGS"],
    "scheduler": ["StepLR", "ExponentialLR", "CosineAnnealingLR", "OneCycleLR", "CyclicLR",
                  "PolynomialLR", "ConstantLR", "LinearLR", "MultiStepLR", "LambdaLR",
                  "CosineAnnealingWarmRestarts", "ReduceLROnPlateau", "SequentialLR", None],
    "loss": ["cross_entropy", "mse_loss", "nll_loss", "ctc_loss", "kl_div", "torch", "gelu"],
    "precision": ["float32", "float64", "bfloat16", "float16"],
    "metrics": [["accuracy"], ["f1_score"], ["mean_squared_error"], ["accuracy", "auroc"], ["x"]],
    "scheduler_interval": ["step", "epoch"],
    "grad_clip_norm": [1e-30, 1.0, 1e308, None, 0],
    "loss_scale": [1.0, 2.0**127, None],
    "stop_on_nan": [True, False],
}  # fmt: skip
HYPER = ["lr", "momentum", "betas", "eps", "weight_decay", "nesterov", "dampening", "amsgrad",
         "foreach", "fused", "capturable", "differentiable", "maximize", "step_size", "gamma",
         "T_max", "max_lr", "total_steps", "base_lr", "power", "total_iters", "milestones",
         "lr_lambda", "T_0", "T_mult", "ns_steps", "rho", "etas", "centered", "alpha"]  # fmt: skip


def change_training(document: Any, dice: Random) -> None:
    """Another optimizer, scheduler, loss, precision, or a number of theirs."""
    models = document.get("models")
    specs = [
        model["training"]
        for model in (models if isinstance(models, list) else [])
        if isinstance(model, dict) and isinstance(model.get("training"), dict)
    ]
    if not specs:
        return
    spec = dice.choice(specs)
    if dice.random() < 0.5:
        name = dice.choice(list(OPTIONS))
        spec[name] = dice.choice(OPTIONS[name])
    for field in dice.sample(["optimizer_kwargs", "scheduler_kwargs"], 1):
        kwargs = spec.setdefault(field, {})
        if isinstance(kwargs, dict):
            small = [0.5, 1, 2, 0.1, [0.9, 0.99], True, None, -1, "x", 1e30, [1, 2]]
            value = dice.choice(small) if dice.random() < 0.7 else literal(dice)
            kwargs[dice.choice(HYPER)] = value


def change_data(document: Any, dice: Random) -> None:
    """Another batch size, seed or source."""
    data = document.get("data")
    specs = [spec for spec in data.values()] if isinstance(data, dict) else []
    if not specs or not isinstance(spec := dice.choice(specs), dict):
        return
    name = dice.choice(["batch_size", "seed", "shuffle", "drop_last", "resident", "kwargs",
                        "augment", "augment_kwargs", "num_workers", "source"])  # fmt: skip
    value = dice.choice([1, 3, 4, 8, 9, True, False, {"features": 5}, {"size": 3}, {}, None])
    spec[name] = value if dice.random() < 0.7 else literal(dice)


def change_tuning(document: Any, dice: Random) -> None:
    """Another setting of the trial."""
    experiment = document.get("experiment")
    tuning = experiment.get("tuning") if isinstance(experiment, dict) else None
    if isinstance(tuning, dict) and tuning:
        fitting = {"layout": ["lanes", "stacked", "channels"], "width": [1, 2], "tape": [True],
                   "capture": [True], "memory_bytes": [1, 10_000], "store_stems": [True, False],
                   "checkpoint": [True], "tf32": [True, False]}  # fmt: skip
        name = dice.choice([*tuning, *fitting])
        value = dice.choice(fitting.get(name, [None]))
        tuning[name] = value if dice.random() < 0.7 else literal(dice)


def rename_model(document: Any, dice: Random) -> None:
    """Another id, everywhere; it may be one that is refused, or another model's."""
    models = document.get("models")
    ids = [m["id"] for m in models or () if isinstance(m, dict) and isinstance(m.get("id"), str)]
    if not ids:
        return
    old, new = dice.choice(ids), dice.choice([*TEXTS, "z", "A", "con", "b.", *ids])
    for part, key in list(places(document)):
        if part[key] == old and isinstance(part[key], str):
            part[key] = new


def duplicate_model(document: Any, dice: Random) -> None:
    """A model twice, or not at all."""
    models = document.get("models")
    if isinstance(models, list) and models:
        if dice.random() < 0.5:
            models.append(copy.deepcopy(dice.choice(models)))
        else:
            del models[dice.randrange(len(models))]


def swap_nodes(document: Any, dice: Random) -> None:
    """Two nodes in each other's place, or with each other's operator, arguments or types."""
    nodes = _nodes(document)
    if len(nodes) < 2:
        return
    first, second = dice.sample(nodes, 2)
    name = dice.choice(["name", "op", "args", "kwargs", "types", "owners", "group", "all"])
    for key in list(first | second) if name == "all" else [name]:
        a, b = first.pop(key, None), second.pop(key, None)
        if b is not None:
            first[key] = b
        if a is not None:
            second[key] = a


def mutated(document: Any, dice: Random, operators: list[str]) -> str:
    """The text of a document with a few changes."""
    found = copy.deepcopy(document)
    changes: list[Callable[[Any, Random], None]] = [
        change_anywhere, change_anywhere, change_numbers, change_reference, change_type,
        change_training, change_data, change_tuning, rename_model, duplicate_model, swap_nodes,
        lambda d, r: change_operator(d, r, operators),
        lambda d, r: change_operator(d, r, operators),
    ]  # fmt: skip
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        if isinstance(found, dict):
            dice.choice(changes)(found, dice)
    text = json.dumps(found)
    for mark, spelled in MARKS.items():
        text = text.replace(f'"{mark}"', spelled)
    if dice.random() < 0.02:
        cut = dice.randrange(len(text))
        text = text[:cut] + dice.choice(["", "\0", "{", "]", '"', text]) + text[cut + 1 :]
    return text
