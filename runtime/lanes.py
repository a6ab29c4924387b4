"""How the models of one loader compute their losses: merged, or each by its own module.

Both kinds (`cgo.runtime.opaque` has the other) have the same methods. `train` computes losses and
gradients, `evaluate` losses and predictions; both return a result or an exception for each model,
so that a model that fails leaves its neighbours' numbers as they are. `update` takes the step.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cgo.graph import Graph, ModelId, restrict
from cgo.runtime.accelerator import accelerator_for, is_out_of_memory, without_frames
from cgo.runtime.bound import Bound, Drawn, Outcome, Result, lanes_of, singles
from cgo.runtime.choice import Choice, divided, rules_for
from cgo.runtime.data import Leaves
from cgo.runtime.fitting import fit
from cgo.runtime.gradients import learning_places
from cgo.runtime.keyed_streams import Streams
from cgo.runtime.lower import lower
from cgo.runtime.member import Member
from cgo.runtime.memory import Cache
from cgo.runtime.packing import PackedState, plan_packs, release
from cgo.runtime.scaling import Scaling
from cgo.runtime.triton_kernels import usable
from cgo.runtime.tuning import Chooser
from cgo.runtime.updates import Updates
from cgo.tuning import Tuning

log = logging.getLogger(__name__)

#: Of what memory is free, what may be copied for a moment when a CPU's step is written down.
_COPIED_SHARE = 0.25


class MergedLanes:
    """Captured models, computed by one program."""

    def __init__(
        self,
        graph: Graph,
        members: Sequence[Member],
        constants: Mapping[str, Tensor],
        device: torch.device,
        choose: Chooser | None = None,
        tell: Callable[..., None] = lambda what, **figures: None,
        tuning: Tuning | None = None,
    ) -> None:
        self.members = {member.id: member for member in members}
        self._graph = graph
        self._learning = learning_places(graph)
        self._constants = constants
        self.device = device
        self._choose = choose or rules_for(device)
        self._tell = tell
        self.expected: dict[str, int] = {}  # bytes of a step, where memory is limited
        self._rehearsed: Cache = {}  # what was found out for it
        self._most_models = 0  # of a program, since memory ran out; 0: no limit
        self._warned: set[str] = set()
        self._chosen = Choice(graph, ())
        self._packed_for: tuple[ModelId, ...] = ()
        self._packed = PackedState((), self.members)
        self.updates: Updates | None = None  # None: each model's own optimizer takes the step
        self.scaling = Scaling.of({member.id: member.scale for member in members})
        self._streams = Streams.of(self.members, graph, device, tuning or Tuning())
        self._programs: dict[tuple[str, tuple[ModelId, ...], bool], Bound] = {}

    def train(self, models: Sequence[ModelId], leaves: Leaves, size: int) -> dict[ModelId, Outcome]:
        """Losses of the given models; gradients wait for `update`."""
        try:
            self._pack(models)
            self._packed.zero_grad()
            bounds = [self._bound(f"train/{size}", ids) for ids in self._chosen.programs]
        except OSError:  # of the folder or the disk, and no model's fault
            raise
        except Exception as error:  # before any random number is drawn
            return self._train_unplanned(models, leaves, size, without_frames(error))
        drawn = [bound.draw() for bound in bounds]
        while True:
            outcomes, failure = self._attempt(bounds, leaves, drawn)
            if failure is None:
                break
            self._packed.zero_grad()
            self._drop_updates()
            if len(models) == 1:
                return {models[0]: failure}
            if not is_out_of_memory(failure) or not self._divide(failure):
                return self._train_apart(models, leaves, size, drawn)
            single = singles(drawn)
            self._repack(models)
            bounds = [self._bound(f"train/{size}", ids) for ids in self._chosen.programs]
            drawn = [bound.together(single) for bound in bounds]
        self._unscale(models)
        if self.updates is None:
            self._arrange_updates(models)
        return outcomes

    def _arrange_updates(self, models: Sequence[ModelId]) -> None:
        """Take the optimizers' steps together; where they cannot be, each model takes its own."""
        updaters = {model: self.members[model].updater for model in models}
        on_device = self.device.type != "cpu" or self._chosen.captured
        accelerator = accelerator_for(self.device) if on_device else None
        kernels = accelerator is not None and usable(self.device, self._chosen.kernels)
        given = updaters, self._packed.learning, accelerator, self.scaling
        try:
            self.updates = Updates(*given, products=self._packed.products, kernels=kernels)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._warn("optimizers step one by one", error)
            self._packed.hand_out_gradients()

    def _warn(self, what: str, error: Exception) -> None:
        """Say once what would be said at every step."""
        text = f"{what}: {type(error).__name__}: {error}"
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)

    def _train_unplanned(
        self, models: Sequence[ModelId], leaves: Leaves, size: int, failure: Exception
    ) -> dict[ModelId, Outcome]:
        """Models that cannot be planned together: each is planned alone, which shows whose fault.

        The next step plans those that are left together again.
        """
        self._warn("models are planned apart", failure)
        self._drop_updates()
        self._packed_for = ()
        outcomes: dict[ModelId, Outcome] = {}
        planned: list[ModelId] = []
        for model in models:
            try:
                self._bound(f"train/{size}", [model], packed=False)
                planned.append(model)
            except Exception as error:
                outcomes[model] = without_frames(error)
        bounds = [self._bound(f"train/{size}", [model], packed=False) for model in planned]
        drawn = [bound.draw() for bound in bounds]
        return outcomes | self._train_apart(planned, leaves, size, drawn)

    def _attempt(
        self, bounds: Sequence[Bound], leaves: Leaves, drawn: Sequence[Drawn]
    ) -> tuple[dict[ModelId, Outcome], Exception | None]:
        """All programs one after another; or what failed, with buffers as they were."""
        outcomes: dict[ModelId, Outcome] = {}
        begun: list[Bound] = []
        try:
            for bound, numbers in zip(bounds, drawn):
                begun.append(bound)
                outcomes |= self._train(bound, leaves, numbers)
            return outcomes, None
        except Exception as error:
            for bound in begun:
                bound.restore()
            return {}, without_frames(error)

    def _divide(self, failure: Exception) -> bool:
        """Halve the programs whose memory did not suffice; False where they are single models."""
        largest = max(map(len, self._chosen.programs))
        before = len(self._chosen.programs)
        most = (min(self._most_models, largest) if self._most_models else largest) // 2
        while most and len(divided(self._chosen, most).programs) == before:
            most //= 2
        if not most:
            return False
        self._most_models = most
        gc.collect()  # what cycles hold since the last time is memory, too
        self._tell("divided", most_models=most, reason=str(failure).partition("\n")[0])
        return True

    def _train(self, bound: Bound, leaves: Leaves, drawn: Drawn) -> dict[ModelId, Result]:
        results = bound.train(leaves, drawn)
        bound.commit(results)
        return {
            output.model: Result(loss)
            for position, result in bound.losses
            for output, loss in lanes_of(result, results[position])
        }

    def _train_apart(
        self, models: Sequence[ModelId], leaves: Leaves, size: int, drawn: Sequence[Drawn]
    ) -> dict[ModelId, Outcome]:
        """Run each model alone on the same random numbers, to find which of them raises."""
        outcomes: dict[ModelId, Outcome] = {}
        single = singles(drawn)
        for model in models:
            self.members[model].updater.zero_grad()
            bound = self._bound(f"train/{size}", [model], packed=False)
            try:
                outcomes |= self._train(bound, leaves, bound.together(single))
            except Exception as error:
                bound.restore()
                outcomes[model] = error
        self._unscale([model for model in models if isinstance(outcomes[model], Result)])
        return outcomes

    def _unscale(self, models: Sequence[ModelId]) -> None:
        """Make the gradients of models that scale their losses what they are without."""
        if self.scaling is None:
            return
        own = {
            model: [p.grad for p in self.members[model].updater.parameters if p.grad is not None]
            for model in models
        }
        self.scaling.unscale(self._packed.gradients(), own)

    # --- for whoever captures steps ---------------------------------------------------------------

    def wants_capture(self, models: Sequence[ModelId], split: str) -> bool:
        """Whether steps of these models are to be captured; they have been run before."""
        if self._packed_for != tuple(models):
            return False
        return self._chosen.captured or (split == "train" and self._chosen.whole)

    def fits_tape(self, bounds: Sequence[Bound]) -> bool:
        """Whether a CPU's training step does nothing but what a tape replays faster.

        Draws are called one by one from Python, and of other optimizers a step with numbers that
        lie in tensors is slower than one with Python's.
        """
        if self._chosen.captured:
            return True
        if self.updates is None or not self.updates.by_rows or self.scaling is not None:
            return False
        if self.updates.nbytes > _COPIED_SHARE * accelerator_for(self.device).free_bytes():
            return False
        drawing = self._streams is not None or any(bound.generators for bound in bounds)
        return not drawing and all(bound.replaying for bound in bounds)

    def buffers(self, bounds: Sequence[Bound]) -> list[Tensor]:
        """What the programs write in place beside gradients."""
        found = {id(buffer): buffer for bound in bounds for buffer in bound.buffers}
        return list(found.values())

    @property
    def packing(self) -> object:
        """Another one each time that state is packed anew."""
        return self._packed

    def settled(self, split: str, size: int, models: Sequence[ModelId]) -> list[Bound] | None:
        """The programs of a step, once each has been run and has the form that it will keep."""
        keys = [(f"{split}/{size}", ids, True) for ids in self._chosen.programs]
        bounds = [self._programs.get(key) for key in keys]
        found = [bound for bound in bounds if bound is not None and bound.settled]
        return found if len(found) == len(keys) else None

    def whole_step(
        self, bounds: Sequence[Bound], leaves: Leaves
    ) -> tuple[list[ModelId], list[Tensor]]:
        """Losses of programs whose gradients and buffers are written; raises what they raise.

        Returns:
            The models, and their losses in that order, as tensors of one or more.
        """
        drawn = [bound.draw() for bound in bounds]
        self.forget_gradients([model for bound in bounds for model in bound.models])
        models: list[ModelId] = []
        losses: list[Tensor] = []
        for bound, numbers in zip(bounds, drawn):
            results = bound.train(leaves, numbers, undo=False)
            bound.commit(results)
            for position, result in bound.losses:
                models += [output.model for output in result.outputs]
                losses.append(results[position].reshape(-1))
        self._unscale(models)
        return models, losses

    def forget_gradients(self, models: Sequence[ModelId]) -> None:
        """Let go of the last step's gradients."""
        self._packed.zero_grad()
        for model in models:
            self.members[model].updater.zero_grad()

    def with_gradient(self, models: Sequence[ModelId]) -> list[Tensor]:
        """Packed leaves, and parameters in no pack, that have a gradient now."""
        own = [p for model in models for p in self.members[model].updater.parameters]
        own = [parameter for parameter in own if id(parameter) not in self._packed.held]
        leaves = [leaf for leaf, _ in self._packed.learning]
        for leaf in leaves:
            self._packed.products.compute(leaf)
        return [tensor for tensor in (*leaves, *own) if tensor.grad is not None]

    def hand_out_gradients(self, *, anew: bool = False) -> None:
        """Make each parameter's gradient of this step readable as its `.grad`."""
        if self.updates is not None:
            self._packed.hand_out_gradients(anew=anew)

    def update(self, models: Sequence[ModelId]) -> dict[ModelId, Exception]:
        """The optimizer step of the given models; returns what failed.

        A model that has diverged and is to end for it stays as it is.
        """
        without = frozenset(model for model in models if self.members[model].diverged)
        failures: dict[ModelId, Exception] = {}
        if self.updates is not None and set(models) == set(self._packed_for):
            failures = self._step_together(self.updates, without)
            covered = self.updates.covers if self.updates is not None else failures.__contains__
            rest = [model for model in models if not covered(model)]
        else:
            self.hand_out_gradients()
            self._drop_updates()
            rest = list(models)
        if rest:
            self.hand_out_gradients()
        failures |= self.step_alone([model for model in rest if model not in without])
        if self.scaling is not None:
            self.scaling.update(models)
        return failures

    def _step_together(
        self, updates: Updates, without: frozenset[ModelId]
    ) -> dict[ModelId, Exception]:
        """The step of all that `updates` covers; returns what failed.

        Hyper-parameters are read before anything is written: what fails there is each model's own.
        """
        try:
            updates.prepare(without)
        except Exception as error:
            self._warn("optimizers step one by one", error)
            self.hand_out_gradients()
            self._drop_updates()
            return {}
        try:
            updates.apply()
        except Exception as error:  # some of it may be written
            return {model: error for model in self._packed_for if updates.covers(model)}
        return updates.finish()

    def step_alone(self, models: Sequence[ModelId]) -> dict[ModelId, Exception]:
        """Let the models' own optimizers take the step; returns what failed."""
        failures: dict[ModelId, Exception] = {}
        for model in models:
            try:
                self.members[model].step()
            except Exception as error:
                failures[model] = error
        return failures

    def evaluate(
        self, models: Sequence[ModelId], leaves: Leaves, size: int
    ) -> dict[ModelId, Outcome]:
        """Losses and predictions of the given models, without gradients."""
        outcomes: dict[ModelId, Outcome] = {}
        try:
            self._pack(models)
            programs = self._chosen.programs
        except OSError:
            raise
        except Exception as error:
            self._warn("models are planned apart", error)
            self._packed_for = ()
            for model in models:
                outcomes |= self._evaluate([model], leaves, size, packed=False)
            return outcomes
        for ids in programs:
            outcomes |= self._evaluate(ids, leaves, size, packed=True)
        return outcomes

    def _evaluate(
        self,
        models: Sequence[ModelId],
        leaves: Leaves,
        size: int,
        *,
        packed: bool,
        single: Mapping[str, Tensor] | None = None,
    ) -> dict[ModelId, Outcome]:
        """`single`: random tensors that were drawn for this step before."""
        bound: Bound | None = None
        drawn: Drawn | None = None
        try:
            bound = self._bound(f"validation/{size}", models, packed=packed)
            drawn = bound.draw() if single is None else bound.together(single)
            results = bound.evaluate(leaves, drawn)
            bound.commit(results)  # a module may keep count in evaluation mode, too
            return bound.outcomes(results)
        except Exception as error:
            if bound is not None:
                bound.restore()
            failure = without_frames(error)
        if len(models) == 1:
            return {models[0]: failure}
        if packed and is_out_of_memory(failure) and self._divide(failure):
            self._packed_for = ()  # packed anew at the next batch
        accelerator_for(self.device).release()
        single = None if drawn is None else singles([drawn])
        outcomes: dict[ModelId, Outcome] = {}
        for model in models:
            outcomes |= self._evaluate([model], leaves, size, packed=False, single=single)
        return outcomes

    def sync(self) -> None:
        """Bring each model's own optimizer and state up to date, for a checkpoint."""
        if self.updates is not None:
            self.updates.sync()
        if self._streams is not None:
            self._streams.store()

    def _drop_updates(self) -> None:
        """Go back to the models' own optimizers."""
        if self.updates is not None:
            self.updates.sync()
        self.updates = None

    def _pack(self, models: Sequence[ModelId]) -> None:
        """Arrange the state of the models that run now; a model that left keeps its own."""
        if self._packed_for != tuple(models):
            self._repack(models)

    def _repack(self, models: Sequence[ModelId]) -> None:
        self._drop_updates()
        self._packed_for = tuple(models)
        self._programs = {key: bound for key, bound in self._programs.items() if not key[2]}
        self._chosen = self._choose(restrict(self._graph, models=set(models)), models)
        if self._most_models:
            self._chosen = divided(self._chosen, self._most_models)
        if math.isfinite(self._chosen.limit_bytes):
            specs = {model: self.members[model].entry.training for model in models}
            limit = self._chosen.limit_bytes
            self._chosen, self.expected = fit(
                self._chosen, specs, limit, self.device, self._tell, cache=self._rehearsed
            )
        self._packed = PackedState(plan_packs(self._chosen.graph), self.members)
        accelerator_for(self.device).release()
        for member in self.members.values():
            release(member, self._packed.held)

    def _bound(self, program: str, models: Sequence[ModelId], *, packed: bool = True) -> Bound:
        key = program, tuple(models), packed
        bound = self._programs.get(key)
        if bound is None:
            graph = self._chosen.graph if packed else self._graph
            part = restrict(graph, models=set(models))
            state = self._packed if packed else PackedState((), self.members)
            ways = self._chosen.ways if packed else {}
            last = self._chosen.images_last
            chosen = self._chosen if packed else Choice(graph, ())
            again = self._chosen.recompute and program.startswith("train/")
            lowered = lower(
                part,
                program,
                self.device,
                state.packs,
                ways=ways,
                images_last=last,
                recompute=again,
            )
            where = f"{program}/{','.join(models)}"
            given = lowered, self.members, self._constants, state, self._learning, chosen, where
            bound = Bound(*given, models=models, scaling=self.scaling, streams=self._streams)
            self._programs[key] = bound
        return bound

    def forget(self, model: ModelId) -> None:
        """Drop the programs that an ended model was part of."""
        self._programs = {key: b for key, b in self._programs.items() if model not in key[1]}
