"""Values of frozen stems, computed once for each sample and gathered in later epochs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cgo.errors import TrialError
from cgo.graph import STATE, Graph, ModelId, Node, Ref, TensorType, restrict
from cgo.passes.sharing import argument_key
from cgo.passes.split_stems import Split, SplitStems, StemValue
from cgo.runtime.accelerator import free_memory
from cgo.runtime.data import DataSets, Leaves, epoch_order, flatten
from cgo.runtime.leaves import moved
from cgo.runtime.lower import Lowered, lower
from cgo.runtime.member import Member
from cgo.tuning import Tuning

log = logging.getLogger(__name__)

#: The part of a device's free memory that stored values may take.
_SHARE = 4


def unaugmented(data: DataSets) -> bool:
    """Whether a sample reads the same in every epoch: other data sets may draw random numbers."""
    plain = type(data.train) is TensorDataset and type(data.validation) is TensorDataset
    return plain and data.spec.augment is None


def spare_bytes(device: torch.device) -> int:
    """How much memory of a device stored values may take now."""
    return free_memory(device) // _SHARE


def stored_bytes(values: Sequence[StemValue], data: DataSets) -> int:
    """What the values of all samples of both splits take."""
    samples = {"train": len(data.train), "validation": len(data.validation)}
    return sum(value.sample_bytes * samples[value.split] for value in values)


def plan_stems(
    graph: Graph,
    members: Mapping[ModelId, Member],
    constants: Mapping[str, Tensor],
    data: DataSets,
    device: torch.device,
    tuning: Tuning,
    *,
    limit_bytes: int | None = None,
    feeding: bool = False,
    tell: Callable[..., None] = lambda what, **figures: None,
) -> StemStore | None:
    """A store for what the captured models compute again and again, where that repays.

    Args:
        graph: The merged graph.
        members: Captured models that train, by id; all of one data spec.
        constants: Tensors of the graph's constants, by content.
        data: What they train on.
        device: Where they train, and where values are kept.
        tuning: `store_stems` is looked at.
        limit_bytes: What the values may take at most; default `spare_bytes(device)`.
        feeding: Where nothing is stored, compute each batch's values once for all devices.
        tell: Hears what is stored, or that memory does not suffice.

    Returns:
        None where nothing is to be stored: every step computes the stem.
    """
    epochs = max((m.entry.training.epochs - len(m.history) for m in members.values()), default=0)
    forced = tuning.store_stems is True
    refused = tuning.store_stems is False or not unaugmented(data) or (epochs < 2 and not forced)
    if refused and not feeding:
        return None
    part = restrict(graph, models=set(members))
    split = SplitStems(1, 0)(part) if forced else SplitStems()(part)
    if not split.values:
        return None
    needed = 0 if refused else stored_bytes(split.values, data)
    limit = spare_bytes(device) if limit_bytes is None else limit_bytes
    if needed > limit:
        tell("stems", bytes=0, values=0, models=0, reason=f"{needed} bytes; {limit} may be taken")
        if not feeding:
            return None
    models = frozenset().union(*(value.models for value in split.values))
    values = len({value.leaf for value in split.values})
    keep = not refused and needed <= limit
    figures = {"values": values, "models": len(models)}
    tell("stems", bytes=needed if keep else 0, **figures, **({} if keep else {"fed": True}))
    return StemStore(split, members, constants, data, device, keep=keep)


class StemStore:
    """The values of a stem for each sample of the training and the validation data.

    The first pass over a split computes them batch by batch, which costs what every pass would cost
    without a store; later passes gather them. A value has the bits that it had in the batch that
    computed it. In another batch, matrix products may have been summed in another order: it agrees
    with what would be computed there within rounding (the same holds of samples by themselves).

    Args:
        split: A graph in two parts; models that read the stored leaves run `split.rest`.
        members: Those whose frozen parameters and buffers the stem reads, by id.
        constants: Tensors of the graph's constants, by content.
        data: The data sets, un-augmented.
        device: Where the values are kept, which is where they are read.
        computed_on: Where the stem runs; default `device`.
        keep: Keep values; without, each batch's are computed anew, for models on several devices.

    Example:
        store.begin("train", epoch)
        for size, leaves in loader.train(epoch):
            extended = store.extend(leaves, size)
    """

    def __init__(
        self,
        split: Split,
        members: Mapping[ModelId, Member],
        constants: Mapping[str, Tensor],
        data: DataSets,
        device: torch.device,
        computed_on: torch.device | None = None,
        *,
        keep: bool = True,
    ) -> None:
        self.rest = split.rest
        self._stem, self._values = split.stem, split.values
        self._members, self._constants, self._data = members, constants, data
        self._device, self._computed_on = device, computed_on or device
        self._keeps = keep
        self._moved: dict[tuple[str, str], Tensor] = {}  # frozen tensors from other devices
        self._programs: dict[str, Lowered] = {}
        self._kept: dict[tuple[str, str], _Kept] = {}  # by split and leaf
        self._adopted: set[tuple[str, str]] = set()  # those that another store has filled
        self._complete: set[str] = set()  # splits all of whose samples are kept
        self._split, self._order = "train", torch.empty(0, dtype=torch.int64)
        self._at = self._filled = 0

    @property
    def complete(self) -> frozenset[str]:
        """Splits whose values are all kept."""
        return frozenset(self._complete)

    def adopt(self, others: Sequence[StemStore]) -> None:
        """Take over values that other stores of the same data keep of all samples of a split.

        They have the bits that they had there, and are not computed or held a second time.
        """
        known = {
            (value.split, signature(other._stem, value)): other._kept[value.split, value.leaf]
            for other in others
            if self._keeps and self._device == other._device
            for value in other._values
            if value.split in other._complete
        }
        for value in self._values:
            kept = known.get((value.split, signature(self._stem, value)))
            if kept is not None:
                self._kept[value.split, value.leaf] = kept
                self._adopted.add((value.split, value.leaf))
        for split in {split for split, _ in self._adopted}:
            if all((split, v.leaf) in self._adopted for v in self._values if v.split == split):
                self._complete.add(split)

    def begin(self, split: str, epoch: int) -> None:
        """Start a pass over a split, whose batches follow in the epoch's order.

        Args:
            split: "train" or "validation".
            epoch: From 0; validation has the same order in all.
        """
        self._split, self._at, self._filled = split, 0, 0
        if split == "train":
            self._order = epoch_order(self._data.spec, self._data.train_samples, epoch)
        else:
            self._order = torch.arange(self._data.validation_samples)

    def extend(self, leaves: Leaves, size: int) -> Leaves:
        """The next batch of the pass with the stem's values added.

        Args:
            leaves: The batch, on any device.
            size: Its samples.

        Raises:
            TrialError: a value is not what the graph says.
        """
        wanted = [value for value in self._values if value.split == self._split]
        if not wanted:
            return leaves
        if not self._keeps:
            computed = self._compute(leaves, size)
            return {**leaves, **{value.leaf: computed[value.leaf] for value in wanted}}
        index = self._order[self._at : self._at + size]
        self._at += size
        place = moved(index, self._device)
        if self._split not in self._complete:
            self._keep(wanted, place, self._compute(leaves, size))
            self._filled += size
        found = {value.leaf: self._kept[self._split, value.leaf].gather(place) for value in wanted}
        if self._filled and self._filled == self._pass_samples():
            self._keep_dropped(wanted)
            self._complete.add(self._split)
        return {**leaves, **found}

    def _pass_samples(self) -> int:
        sizes = self._data.train_sizes if self._split == "train" else self._data.validation_sizes
        return sum(sizes)

    def _keep(
        self, wanted: Sequence[StemValue], index: Tensor, computed: Mapping[str, Tensor]
    ) -> None:
        for value in wanted:
            key, tensor = (self._split, value.leaf), computed[value.leaf].to(self._device)
            _check(value, tensor)
            if key in self._adopted:
                continue
            if key not in self._kept:
                samples = len(self._order)
                self._kept[key] = _Kept.like(tensor, samples)
            self._kept[key].put(index, tensor[: len(index)])

    def _keep_dropped(self, wanted: Sequence[StemValue]) -> None:
        """Compute the samples that the epoch has left out because they fill no batch."""
        dropped = self._order[self._filled :]
        if not len(dropped):
            return
        size = self._data.spec.batch_size
        index = torch.cat([dropped, dropped[:1].expand(size - len(dropped))])
        leaves = flatten(tuple(tensor[index] for tensor in self._data.train.tensors))
        self._keep(wanted, moved(dropped, self._device), self._compute(leaves, size))

    def _compute(self, leaves: Leaves, size: int) -> dict[str, Tensor]:
        """The stem's values for a batch, by leaf."""
        name = f"{self._split}/{size}"
        if name not in self._programs:
            self._programs[name] = lower(self._stem, name, self._computed_on)
        program = self._programs[name]
        with torch.no_grad():
            results = program([self._source(s.nodes[0], leaves) for s in program.sources])
        return {r.outputs[0].key: value for r, value in zip(program.results, results)}

    def _source(self, node: Node, leaves: Leaves) -> Tensor:
        if node.op == "cgo.input":
            return leaves[str(node.keyword("leaf"))].to(self._computed_on, non_blocking=True)
        if node.op == "cgo.constant":
            return self._here("", str(node.keyword("content")), self._constants)
        model, path = str(node.keyword("model")), str(node.keyword("path"))
        return self._here(model, path, self._members[model].state.tensors)

    def _here(self, model: str, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """A frozen tensor where the stem runs.

        One that is there is looked up each time: packing gives a model's tensors other memory.
        """
        if tensors[name].device == self._computed_on:
            return tensors[name]
        if (model, name) not in self._moved:
            self._moved[model, name] = tensors[name].to(self._computed_on)
        return self._moved[model, name]


@dataclass
class _Kept:
    """One value of all samples; images lie with channels last, as convolutions leave them."""

    rows: Tensor
    images: bool

    @classmethod
    def like(cls, batch: Tensor, samples: int) -> _Kept:
        images = batch.ndim == 4 and not batch.is_contiguous()
        images = images and batch.is_contiguous(memory_format=torch.channels_last)
        shape = batch.permute(0, 2, 3, 1).shape if images else batch.shape
        return cls(batch.new_empty((samples, *shape[1:])), images)

    def put(self, index: Tensor, batch: Tensor) -> None:
        self.rows.index_copy_(0, index, batch.permute(0, 2, 3, 1) if self.images else batch)

    def gather(self, index: Tensor) -> Tensor:
        batch = self.rows.index_select(0, index)
        return batch.permute(0, 3, 1, 2) if self.images else batch


#: Keywords that say whose something is, and not what.
_NAMES = frozenset({"model", "path", "twins"})


def signature(stem: Graph, value: StemValue) -> str:
    """Equal for values that are the same for every sample, in whatever graph they were found."""
    own = [o for o in stem.outputs if o.key == value.leaf and o.program.startswith(value.split)]
    output = max(own, key=lambda output: output.program)
    digests: dict[str, str] = {}
    for node in restrict(Graph(stem.nodes, (output,))).nodes:
        refs: list[Ref] = []
        kwargs = tuple((k, v) for k, v in node.kwargs if k not in _NAMES)
        literals = argument_key(node.args, refs), argument_key(kwargs, refs)
        read = [(digests[ref.name], ref.index) for ref in refs]
        known = node.keyword("content") or node.op not in (*STATE, "cgo.constant")
        row = (node.op, literals, read, node.types, node.autocast, None if known else node.name)
        digests[node.name] = hashlib.sha256(repr(row).encode()).hexdigest()
    return f"{digests[output.ref.name]}.{output.ref.index}/{output.program}"


def _check(value: StemValue, batch: Tensor) -> None:
    """What autocast gives, for one, is not always what was recorded."""
    type_: TensorType = value.type
    if str(batch.dtype) != f"torch.{type_.dtype}" or tuple(batch.shape[1:]) != type_.shape:
        raise TrialError(
            f"stem value {value.leaf} of {', '.join(sorted(value.models))} is {batch.dtype} "
            f"{list(batch.shape[1:])} a sample; the graph says {type_.dtype} {list(type_.shape)}; "
            "train with Tuning(store_stems=False)"
        )
