"""What the optimizers' step holds, of many models that are alike found out by a few of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from cgo.graph import ModelId, TensorType
from cgo.model import TrainingSpec
from cgo.runtime.gradients import Place
from cgo.runtime.packing import Pack
from cgo.runtime.rehearsal import Held, rehearse_update

#: So many models stand for all that are alike, where these are at least twice as many.
_FEW = 8


def update_held(
    types: Mapping[Place, TensorType],
    learning: frozenset[Place],
    packs: Sequence[Pack],
    trainings: Mapping[ModelId, TrainingSpec],
    device_type: str = "cpu",
) -> Held:
    """As `rehearse_update`; its time depends on how many kinds of models there are.

    A step goes over the tensors of all models of a kind alike, so what it holds grows with their
    number. Of several kinds it is what each holds, added up: no less than what they hold in turn.

    Args:
        types: Of all parameters.
        learning: Those that get a gradient.
        packs: Those that lie in one tensor.
        trainings: By model; others take no step.
        device_type: Of the device that it is to run on.
    """
    many = [group for group in _alike(types, learning, trainings) if len(group) >= 2 * _FEW]
    few = [_spread(group, trainings) for group in many]
    left_out = {model for group, kept in zip(many, few) for model in set(group) - set(kept)}

    def rehearsed(models: Collection[ModelId]) -> Held:
        """Of these models; those that take no step are among them."""
        own = {place: type_ for place, type_ in types.items() if place[0] in models}
        specs = {model: spec for model, spec in trainings.items() if model in models}
        return rehearse_update(own, learning, _lanes_of(packs, models), specs, device_type)

    everyone = {model for model, _ in types} | set(trainings)
    held = rehearsed(everyone - left_out)
    for group, kept in zip(many, few):
        alone = held if len(kept) == len(everyone - left_out) else rehearsed(set(kept))
        more = len(group) / len(kept) - 1
        held = Held(
            held.highest + round(more * alone.highest), held.after + round(more * alone.after)
        )
    return held


def _alike(
    types: Mapping[Place, TensorType],
    learning: frozenset[Place],
    trainings: Mapping[ModelId, TrainingSpec],
) -> list[list[ModelId]]:
    """Models with equal parameters whose training differs in the learning rate at most."""
    own: dict[ModelId, list[object]] = {model: [] for model in trainings}
    for place, type_ in types.items():
        if place[0] in own:
            own[place[0]].append((place[1], type_, place in learning))
    groups: dict[object, list[ModelId]] = {}
    for model, spec in trainings.items():
        kwargs = {key: value for key, value in spec.optimizer_kwargs.items() if key != "lr"}
        rest = replace(spec, optimizer_kwargs=kwargs, scheduler=None, scheduler_kwargs={})
        groups.setdefault((repr(rest), tuple(own[model])), []).append(model)
    return list(groups.values())


def _spread(group: Sequence[ModelId], trainings: Mapping[ModelId, TrainingSpec]) -> list[ModelId]:
    """A few of the models; their learning rates differ if those of all do."""
    ordered = sorted(group, key=lambda model: repr(trainings[model].optimizer_kwargs.get("lr")))
    last = len(ordered) - 1
    return [ordered[round(i * last / (_FEW - 1))] for i in range(_FEW)]


def _lanes_of(packs: Sequence[Pack], models: Collection[ModelId]) -> list[Pack]:
    """The packs without the lanes of other models."""
    found = []
    for pack in packs:
        lanes = [(n, p) for n, p in zip(pack.names, pack.places) if p[0] in models]
        if lanes:
            names, places = zip(*lanes)
            found.append(Pack(names, places, pack.trainable))
    return found
