"""What one model owns in a trial: its parameters, buffers and random stream."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cgo import weights
from cgo.dtypes import torch_dtype
from cgo.errors import ModelError
from cgo.graph_data import GraphData, ModelEntry, StateEntry
from cgo.imports import resolve
from cgo.runtime.data import preserved_random_state, seed_all
from cgo.runtime.keyed_draws import DOMAINS
from cgo.user_code import contained, told


def build_module(
    target: str, kwargs: dict[str, Any], seed: int, precision: str
) -> tuple[nn.Module, RandomState]:
    """Call a factory right after `torch.manual_seed(seed)`; returns its module and what the random
    streams were when it returned.

    Raises:
        ModelError: the factory raised, or returned no module.
    """
    factory = resolve(target, field="module")
    with preserved_random_state():
        seed_all(seed)
        try:
            with contained:
                module = factory(**kwargs)
        except Exception as error:
            raise ModelError(f"factory {target} raised {told(error)}") from error
        if not isinstance(module, nn.Module):
            raise ModelError(f"factory {target} returned a {type(module).__name__}, no nn.Module")
        if precision == "float64":
            module = module.double()
        return module, RandomState.current()


class RandomState:
    """The three global random streams at one moment."""

    def __init__(self, torch_state: Tensor, numpy_state: Any, python_state: Any) -> None:
        self.torch_state = torch_state
        self.numpy_state = numpy_state
        self.python_state = python_state

    @classmethod
    def current(cls) -> RandomState:
        """Read the global streams."""
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())

    @classmethod
    def seeded(cls, seed: int) -> RandomState:
        """The streams right after seeding."""
        with preserved_random_state():
            seed_all(seed)
            return cls.current()

    def enter(self) -> None:
        """Make these the global streams."""
        torch.set_rng_state(self.torch_state)
        np.random.set_state(self.numpy_state)
        random.setstate(self.python_state)

    def dump(self) -> dict[str, Any]:
        """As plain values and tensors, for a checkpoint."""
        name, keys, *rest = self.numpy_state
        numbers = torch.from_numpy(np.asarray(keys).astype(np.int64))
        return {
            "torch": self.torch_state,
            "numpy": [name, numbers, *rest],
            "python": self.python_state,
        }

    @classmethod
    def load(cls, values: dict[str, Any]) -> RandomState:
        """The inverse of `dump`."""
        name, numbers, *rest = values["numpy"]
        version, internal, gauss = values["python"]
        numpy_state = (name, numbers.numpy().astype(np.uint32), *rest)
        return cls(values["torch"], numpy_state, (version, tuple(internal), gauss))


class ModelState:
    """Parameters and buffers of one model, by the module's own names, on the trial's device."""

    def __init__(self, entry: ModelEntry, data: GraphData, device: torch.device) -> None:
        self.entry = entry
        self.device = device
        self.module: nn.Module | None = None
        if entry.factory is not None:
            factory, precision = entry.factory, entry.training.precision
            self.module, self.random = build_module(
                factory.target, dict(factory.kwargs), entry.seed, precision
            )
            if entry.begun is not None:
                self._begin(weights.load(data.base / entry.begun.file))
            self.module.to(device)
            self.tensors = _module_tensors(self.module)
            self._check_shapes()
        else:
            assert entry.weights is not None
            self.random = RandomState.seeded(entry.seed)
            self.tensors = self._loaded(weights.load(data.base / entry.weights.file))
        #: What keyed streams count: batches that it was trained and evaluated on.
        self.steps = dict.fromkeys(DOMAINS, 0)
        self._constant = self._unchanging(data)
        self._marks: dict[str, int] | None = None  # of those, once taken
        self.generator = torch.Generator(device=device)
        if device.type == "cpu":
            self.generator.set_state(self.random.torch_state)
        else:
            self.generator.manual_seed(entry.seed)

    def _unchanging(self, data: GraphData) -> list[str]:
        """Parameters that are not trained and buffers that no program writes, each tensor once.

        None of a module that is called: it may do what it likes.
        """
        if self.entry.opaque is not None or all(e.trainable for e in self.entry.state):
            return []
        own = (o for o in data.graph.outputs if o.role == "update" and o.model == self.entry.id)
        changing = {id(self.tensors[o.key]) for o in own if o.key in self.tensors}
        changing |= {id(self.tensors[e.path]) for e in self.entry.state if e.trainable}
        first = {id(tensor): path for path, tensor in reversed(self.tensors.items())}
        return [path for tensor, path in first.items() if tensor not in changing]

    def _begin(self, stored: dict[str, Tensor]) -> None:
        """Give the module what its first call sets up, and its stream the place after that call."""
        assert self.module is not None
        persistent = {entry.path: entry.persistent for entry in self.entry.state}
        self.random.torch_state = stored.pop(STREAM, self.random.torch_state)
        for path, tensor in stored.items():
            put_tensor(self.module, path, tensor, persistent=persistent.get(path, True))

    def _loaded(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for entry in self.entry.state:
            if entry.alias_of is not None:
                tensors[entry.path] = tensors[entry.alias_of]
                continue
            self._check(entry, stored.get(entry.path), "the file holds")
            tensor = stored[entry.path].to(self.device)
            if entry.kind == "parameter":
                tensor = nn.Parameter(tensor, requires_grad=entry.trainable)
            tensors[entry.path] = tensor
        return tensors

    def _check_shapes(self) -> None:
        for entry in self.entry.state:
            self._check(entry, self.tensors.get(entry.path), "the factory built")
        if more := self.tensors.keys() - {entry.path for entry in self.entry.state}:
            raise ModelError(
                f"the factory built {', '.join(sorted(more)[:5])} here and not when the model was "
                "submitted; a factory must build the same module each time"
            )

    def _check(self, entry: StateEntry, tensor: Tensor | None, what: str) -> None:
        """What is there is what the model was submitted with: programs are planned with that."""
        found = None if tensor is None else tuple(tensor.shape)
        if tensor is None or found != entry.shape:
            raise ModelError(
                f"{what} {entry.path} of shape {found} here and {entry.shape} when the model was "
                "submitted; a factory must build the same module each time"
            )
        if tensor.dtype is not torch_dtype(entry.dtype):
            raise ModelError(f"{what} {entry.path} of {tensor.dtype}, and not of {entry.dtype}")
        if self.module is not None:
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            trainable = kind == "parameter" and tensor.requires_grad
            if (kind, trainable) != (entry.kind, entry.trainable):
                raise ModelError(
                    f"{what} {entry.path} as a {kind} that is {_trained(trainable)}, and not as a "
                    f"{entry.kind} that is {_trained(entry.trainable)}"
                )

    def parameters(self) -> list[Tensor]:
        """Each parameter once, in the module's own order."""
        return [
            self.tensors[entry.path]
            for entry in self.entry.state
            if entry.kind == "parameter" and entry.alias_of is None
        ]

    def named_gradients(self) -> dict[str, Tensor | None]:
        """The gradient of every parameter, None where it has none."""
        return {
            entry.path: self.tensors[entry.path].grad
            for entry in self.entry.state
            if entry.kind == "parameter" and entry.alias_of is None
        }

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What the module's own `state_dict` would hold, and the aliases among it."""
        if self.entry.opaque is not None:
            return self._saved()
        kept = [entry for entry in self.entry.state if entry.persistent]
        tensors = {e.path: self.tensors[e.path] for e in kept if e.alias_of is None}
        return tensors, {e.path: e.alias_of for e in kept if e.alias_of is not None}

    def _saved(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Of a module that is called: it may bind buffers anew, and register others."""
        assert self.module is not None
        first: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        for path, tensor in self.module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                continue
            if (twin := first.setdefault(id(tensor), path)) == path:
                tensors[path] = tensor
            else:
                aliases[path] = twin
        return tensors, aliases

    def dump(self, *, whole: bool = True) -> dict[str, Any]:
        """Everything a checkpoint needs, as tensors and plain values.

        Args:
            whole: With tensors that never change; else with marks, by which they are known again.
        """
        if self.entry.opaque is not None and self.module is not None:
            self.tensors = _module_tensors(self.module)
        own = {id(tensor): path for path, tensor in reversed(self.tensors.items())}
        if not whole and self._marks is None:
            self._marks = marks({path: self.tensors[path] for path in self._constant})
        unchanged = {} if whole or self._marks is None else self._marks
        kept = [path for path in own.values() if path not in unchanged]
        return {
            "tensors": {path: self.tensors[path].detach().clone() for path in kept},
            "unchanged": unchanged,
            "attributes": self._attributes(),
            "generator": self.generator.get_state(),
            "random": self.random.dump(),
            "steps": dict(self.steps),
        }

    def _attributes(self) -> dict[str, dict[str, Any]]:
        """Plain values that a module which is called keeps, by path of its part and name."""
        if self.entry.opaque is None or self.module is None:
            return {}
        return {path: plain_attributes(part) for path, part in self.module.named_modules()}

    def load(self, values: dict[str, Any]) -> None:
        """Go back to what `dump` gave.

        Raises:
            ModelError: tensors have other shapes now, or those that never change other values.
        """
        self._check_unchanged(values.get("unchanged", {}))
        if self.entry.opaque is not None and self.module is not None:
            for path, tensor in values["tensors"].items():
                put_tensor(self.module, path, tensor.to(self.device), persistent=True)
            for path, attributes in values.get("attributes", {}).items():
                vars(self.module.get_submodule(path)).update(attributes)
            self.tensors = _module_tensors(self.module)
        else:
            with torch.no_grad():
                for path, tensor in values["tensors"].items():
                    if tensor.shape != self.tensors[path].shape:
                        raise ModelError(f"{path} of shape {tuple(tensor.shape)} was kept")
                    self.tensors[path].copy_(tensor)
        self.generator.set_state(values["generator"])
        self.random = RandomState.load(values["random"])
        self.steps |= values.get("steps", {})

    def _check_unchanged(self, kept: dict[str, int]) -> None:
        missing = kept.keys() - self.tensors.keys()
        found = marks({path: self.tensors[path] for path in kept if path not in missing})
        other = sorted(missing | {path for path, mark in found.items() if mark != kept[path]})
        if other:
            raise ModelError(
                f"{other[0]} has other values here than when the training began, and as it never "
                "changes it is in no checkpoint; a factory must build the same module each time"
            )


def marks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers by which tensors' bits are known again, whatever device they are on."""
    sums: dict[str, Tensor] = {}
    for path, tensor in tensors.items():
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        words = len(flat) // 8 * 8
        if flat.storage_offset() % 8:  # a lane of a pack: read as words, it has to begin at one
            flat = flat.clone()
        sums[path] = flat[:words].view(torch.int64).sum() + flat[words:].long().sum()
    return dict(zip(sums, torch.stack(list(sums.values())).tolist())) if sums else {}


def _trained(trainable: bool) -> str:
    return "trained" if trainable else "not trained"


#: Attributes that every module has.
_EVERY_MODULES = frozenset(vars(nn.Module()))


def plain_attributes(part: nn.Module) -> dict[str, Any]:
    """Attributes of a module that are plain values, such as what it counts; not its modes."""
    found = {name: value for name, value in vars(part).items() if name not in _EVERY_MODULES}
    return {name: copy.deepcopy(value) for name, value in found.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return value is None or type(value) in (bool, int, float, str)


#: The name of torch's random stream among the tensors of a first call.
STREAM = "cgo.stream"


def put_tensor(module: nn.Module, path: str, tensor: Tensor, *, persistent: bool) -> None:
    """Give a module a parameter's or buffer's value; lazy and missing ones are made.

    Args:
        module: Changed in place.
        path: Of the tensor; a name that is neither is registered as a buffer.
        tensor: The value; a parameter is copied into, a buffer replaced.
        persistent: Whether `state_dict` is to hold a new buffer.
    """
    prefix, _, name = path.rpartition(".")
    part = module.get_submodule(prefix)
    parameter = part._parameters.get(name)
    if parameter is not None:
        if is_lazy(parameter):
            parameter.materialize(tensor.shape)  # type: ignore[attr-defined]
        with torch.no_grad():
            parameter.copy_(tensor)
    elif name in part._buffers:
        part._buffers[name] = tensor
    else:
        if hasattr(part, name):  # a placeholder, such as None
            delattr(part, name)
        part.register_buffer(name, tensor, persistent=persistent)


def _module_tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    return tensors
