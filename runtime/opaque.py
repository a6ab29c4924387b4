"""How a model that was not captured computes its losses: by its own module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from cgo.runtime.bound import Outcome, Result
from cgo.runtime.data import Leaves, preserved_random_state
from cgo.runtime.member import Member
from cgo.runtime.scaling import Scaling, seeds
from cgo.runtime.state import RandomState
from cgo.runtime.step import autocast, compute, eval_mode
from cgo.user_code import contained


class OpaqueLane:
    """A model that was not captured: its own module is called, on its own copy of the batch."""

    def __init__(self, member: Member) -> None:
        assert member.state.module is not None
        assert member.loss is not None
        self.member = member
        self._module = member.state.module
        self._training = member.entry.training
        self._scaling = Scaling.of({member.id: member.scale})
        self._loss = member.loss
        self._entered = False

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let the process's random streams be the model's for a block of several calls.

        Changing them takes as long as a step of a small model.
        """
        if self._entered:
            yield
            return
        state = self.member.state
        with preserved_random_state(), self._device_stream():
            state.random.enter()
            self._entered = True
            try:
                yield
            finally:
                self._entered = False
                state.random = RandomState.current()

    def train(self, leaves: Leaves) -> Outcome:
        """The loss, after its backward."""
        try:
            with contained:
                result = self._compute(leaves)
                if result.loss.requires_grad:
                    self._backward(result.loss)
                return result
        except Exception as error:
            return error

    def _backward(self, loss: Tensor) -> None:
        if self._scaling is None:
            loss.backward()
            return
        model, parameters = self.member.id, self.member.updater.parameters
        loss.backward(seeds(self._scaling.scale, self._scaling.lanes([model]), loss))
        own = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._scaling.unscale((), {model: own})

    def update(self) -> None:
        """The optimizer step."""
        self.member.step()
        if self._scaling is not None:
            self._scaling.update([self.member.id])

    def evaluate(self, leaves: Leaves) -> Outcome:
        """The loss and the prediction in evaluation mode."""
        try:
            with contained, eval_mode(self._module), torch.no_grad():
                return self._compute(leaves)
        except Exception as error:
            return error

    def _compute(self, leaves: Leaves) -> Result:
        own = {name: leaf.clone() for name, leaf in leaves.items()}
        with self.entered(), autocast(self._training, self.member.state.device):
            double = self._training.precision == "float64"
            loss, prediction = compute(self._module, self._loss, own, double=double)
        return Result(loss, prediction if isinstance(prediction, Tensor) else None)

    @contextlib.contextmanager
    def _device_stream(self) -> Iterator[None]:
        """On CUDA, let the module draw from its model's own stream instead of the process's."""
        device, generator = self.member.state.device, self.member.state.generator
        if device.type != "cuda":
            yield
            return
        before = torch.cuda.get_rng_state(device)
        torch.cuda.set_rng_state(generator.get_state(), device)
        try:
            yield
        finally:
            generator.set_state(torch.cuda.get_rng_state(device))
            torch.cuda.set_rng_state(before, device)
