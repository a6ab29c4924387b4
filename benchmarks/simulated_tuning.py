"""What tuning takes on a GPU, and what it chooses there, simulated: no GPU is touched.

    python benchmarks/gpu_suite.py --plan-only --plans FOLDER
    python benchmarks/simulated_tuning.py --plans FOLDER --out benchmarks/results/...json

The trial's own tuner decides for a CUDA device that is not there. Where it asks for a measurement,
a group is executed on tensors without values, and each of its operators' calls takes what a model
of the device says; the clock, by which its budget is kept, goes on by what such a measurement takes
on a real one. The model is the roofline of a profile, times what was seen above it on an H200
(`results/gpu_operators_h200.json`): it says what tuning costs and how wide groups become, and not
how fast a step will be.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gpu_counting import _UNTOUCHED, _size
from gpu_workloads import WORKLOADS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from cgo import bench
from cgo.graph import Graph, is_training, program_of, programs, restrict
from cgo.graph_data import GraphData
from cgo.private.fake_tensors import FakeTensorMode
from cgo.runtime import costs
from cgo.runtime.choice import LOOP, Choice, Rules, rules_for
from cgo.runtime.cost_table import CostTable
from cgo.runtime.costs import Timer
from cgo.runtime.device_profile import DeviceProfile, prior
from cgo.runtime.lower import Lowered, lower
from cgo.runtime.packing import plan_packs
from cgo.runtime.precision import float32_products
from cgo.runtime.tuning import Tuner
from cgo.tuning import Tuning

#: A device that is not there; its number keeps torch from asking for the current one.
DEVICE = torch.device("cuda:0")
CPU = torch.device("cpu")

#: Tensors without values, as if on a CPU.
FAKES = FakeTensorMode(allow_non_fake_inputs=True)

#: Planned steps: those that `gpu_suite.py` plans, and those of a long training.
STEPS = 20_000

PROFILES = {
    "h100": prior("NVIDIA H100 80GB HBM3", (9, 0), 132),
    "h200": prior("NVIDIA H200", (9, 0), 132),
}

# --- the device -----------------------------------------------------------------------------------

#: Of the published bandwidth and rates, what large copies and products reach (H200: 4.0 of 4.8
#: TB/s, 396 of 494 TFLOP/s).
_REACHED = 0.82

#: Until a kernel has all of the device at work, and until its last block ends.
_RAMP_S = 1e-6

#: Elements of a product that one multiprocessor computes at a time, how many may share one such
#: tile's sums, and multiprocessors.
_TILE, _SPLIT, _MULTIPROCESSORS = 128 * 128, 16, 132

#: Kernels that a call of these launches.
_KERNELS = {"convolution_backward": 3, "native_batch_norm_backward": 2, "native_batch_norm": 2}


@dataclass
class Device:
    """Seconds of operators' calls on a simulated device.

    Args:
        profile: What the device can do.
        searching: cuDNN times its kernels, and takes the best.
        found: Shapes that it did that for, which it keeps to.
    """

    profile: DeviceProfile
    searching: bool = False
    found: set[Any] = field(default_factory=set)

    def seconds(
        self, name: str, moved: float, flops: float, call: Sequence[Any], outputs: int
    ) -> float:
        """Of one call that gives so many elements."""
        kernels = _KERNELS.get(name, 1)
        tf32 = float32_products(convolutions="convolution" in name)
        dtype = next((str(v.dtype)[6:] for v in call if isinstance(v, Tensor)), "float32")
        precision = tf32 if dtype == "float32" else dtype
        if "convolution" in name:
            least = self.profile.seconds(moved / _REACHED, flops / _REACHED, precision, kernels)
            return self._convolution(name, least, kernels, call)
        tiles = max(1, math.ceil(outputs / _TILE))
        busy = min(1.0, _SPLIT * tiles / _MULTIPROCESSORS)
        least = self.profile.seconds(moved / _REACHED, flops / _REACHED / busy, precision, 0)
        return kernels * (self.profile.launch_s + _RAMP_S) + least

    def _convolution(self, name: str, least: float, kernels: int, call: Sequence[Any]) -> float:
        """By what was measured: times the least for grouped ones, and a floor for single ones."""
        backward = name.endswith("backward")
        x, weight = (call[1], call[2]) if backward else (call[0], call[1])
        groups = call[9] if backward else call[8]
        strided = max(call[4] if backward else call[3]) > 1
        last = x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1
        pixel, channels = set(weight.shape[2:]) == {1}, weight.shape[1]
        shape = (name, x.shape, weight.shape, groups, last)
        if self.searching:
            self.found.add(shape)
        searched = shape in self.found
        if groups == 1:
            floor, over = (9e-6, 5.0) if pixel else (15e-6, 7.0 if channels >= 64 else 17.0)
            over *= (0.6 if last and not pixel else 1.0) * (0.6 if searched else 1.0)
            return max(kernels * floor, over * least)
        if pixel:
            over = (20.0, 3.0)[searched] if last else (36.0, 4.0)[searched]
        elif strided or channels < 8:
            over = 14.0 if last else 10.0
        else:
            over = 5.0 if last else 7.0
        return max(kernels * 5e-6, over * least)


class _Counted(TorchDispatchMode):
    """Adds up what calls take on a device."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.seconds, self.calls = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("aten") and not func.is_view and name not in _UNTOUCHED:
            moved = sum(map(_size, tree_iter((args, kwargs, result))))
            name = name.partition("::")[2]
            flops = 0.0
            if "convolution" in name:
                flops = _convolved(name, args)
            elif (count := flop_registry.get(func._overloadpacket)) is not None:
                flops = float(count(*args, **(kwargs or {}), out_val=result))
            outputs = sum(v.numel() for v in tree_iter(result) if isinstance(v, Tensor))
            self.seconds += self.device.seconds(name, moved, flops, args, outputs)
            self.calls += 1
        return result


def _convolved(name: str, call: Sequence[Any]) -> float:
    """FLOPs; torch counts a backward's as if every group met all channels."""
    if name.endswith("backward"):
        return 4.0 * call[0].numel() * math.prod(call[2].shape[1:])
    (x, weight), stride = call[:2], call[3]
    pixels = math.prod(size // step for size, step in zip(x.shape[2:], stride))
    return 2.0 * x.shape[0] * weight.shape[0] * pixels * math.prod(weight.shape[1:])


def executed(device: Device, function: Callable[..., Any], values: Sequence[Tensor]) -> _Counted:
    """What a forward and backward take on a device; values are tensors without storage."""
    with FAKES, _Counted(device) as counted:
        given = [value for value in values if value.requires_grad]
        results = [r for r in function(*values) if isinstance(r, Tensor) and r.requires_grad]
        if results:
            ones = [torch.empty_like(result) for result in results]
            torch.autograd.grad(results, given, ones, allow_unused=True)
    return counted


# --- measuring on it ------------------------------------------------------------------------------

#: What a measurement took on an H200 (`results/gpu_suite_h200.json`, "tuned"): 62 to 465 of them
#: took 0.6 to 2.2 s. Host seconds of one and of each of its calls (recorded, interpreted and
#: captured), runs on the device, and once a process, for libraries that are loaded.
_ONE_S, _CALL_S, _RUNS, _LOADING_S = 3e-3, 3 * 30e-6, 9, 0.45


@dataclass
class Simulation:
    """A device with a clock."""

    device: Device
    now: float = 0.0
    measured: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def timed(self, function: Callable[..., Any], values: Sequence[Tensor]) -> float:
        """What a measurement finds; the clock goes on by what it takes."""
        if not self.measured:
            self.now += _LOADING_S
        self.measured += 1
        self.device.searching = torch.backends.cudnn.benchmark
        found = executed(self.device, function, values)
        self.now += _ONE_S + _CALL_S * found.calls + _RUNS * found.seconds
        if self.device.searching:
            self.now += self.device.profile.search_s
        return max(1e-6, found.seconds)

    def timer(self, *args: Any, **kwargs: Any) -> SimulatedTimer:
        """Makes what measures groups."""
        return SimulatedTimer(self, *args, **kwargs)


class SimulatedTimer(Timer):
    """Measures on a simulated device."""

    def __init__(self, simulation: Simulation, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._simulation = simulation

    def _value(self, given: Any) -> Tensor:
        device, self._device = self._device, CPU
        try:
            with FAKES:
                return super()._value(given)
        finally:
            self._device = device

    def timed(self, function: Callable[..., Any], sets: list[list[Tensor]]) -> float:
        """On the simulated device."""
        return self._simulation.timed(function, sets[0])

    def repacked(self, kind: str, size: int) -> float:
        """On the simulated device."""
        with FAKES:
            function, sets = costs.repacking_of(kind, size, CPU)
        return self._simulation.timed(function, sets[0])


# --- what comes of it -----------------------------------------------------------------------------


def row(data: GraphData, profile: DeviceProfile, steps: int, rules: Rules) -> dict[str, Any]:
    """A workload's figures."""
    simulation = Simulation(Device(profile))
    told: list[dict[str, Any]] = []
    tuner = Tuner(
        CostTable(None, DEVICE, key=f"simulated {profile.name}"),
        DEVICE,
        rules,
        Tuning(memory_bytes=2**40),
        steps,
        tell=lambda what, **figures: told.append(figures),
        profile=replace(profile, source="measured"),
        timing=simulation.timer,
        separates=True,  # nothing has values there
        clock=simulation.clock,
    )
    models = sorted({output.model for output in data.graph.outputs})
    started = time.perf_counter()
    choice = tuner(data.graph, models)
    host_s = time.perf_counter() - started
    return {
        "charged_s": simulation.now, "budget_s": tuner.budget.seconds,
        "measured": simulation.measured, "host_s": host_s, **figures(data.graph, choice),
        "images_last": choice.images_last, "ways": told[0]["ways"],
        **stepped(simulation.device, choice),
        "step_at_full_width_s": stepped(simulation.device, _widest(data.graph))["step_s"],
    }  # fmt: skip


def figures(graph: Graph, choice: Choice) -> dict[str, Any]:
    """Groups, the pieces that they become, and calls of the forward."""
    before, after = (_groups(g) for g in (graph, choice.graph))
    fused = {name for name in after if not name.endswith(LOOP)}
    divided = {name.rpartition("/")[0] for name in fused if name not in before}
    looped = sum(name.endswith(LOOP) for name in after)
    return {
        "groups": len(before), "pieces": len(after), "loops": looped,
        "fused": len(fused), "divided": len({d for d in divided if d in before}),
        "calls": sum(lowered.calls for lowered in _lowered(choice)),
        "calls_at_full_width": sum(lowered.calls for lowered in _lowered(_widest(graph))),
    }  # fmt: skip


def _groups(graph: Graph) -> set[str]:
    return {node.group for node in graph.nodes if node.group is not None and is_training(node)}


def _widest(graph: Graph) -> Choice:
    """Every group as one operator."""
    return Rules()(graph, sorted({output.model for output in graph.outputs}))


def _lowered(choice: Choice) -> Iterator[Lowered]:
    packs = plan_packs(choice.graph)
    names = [name for name in programs(choice.graph) if name.startswith("train/")]
    name = max(names, key=lambda name: int(name.partition("/")[2]))
    last = bool(choice.images_last)
    for ids in choice.programs:
        part = restrict(choice.graph, models=set(ids))
        if any(program_of(node) == name for node in part.nodes):
            yield lower(part, name, DEVICE, packs, ways=choice.ways, images_last=last)


def stepped(device: Device, choice: Choice) -> dict[str, float]:
    """A whole forward and backward of what was chosen, on the simulated device."""
    device.searching = False
    seconds, calls = 0.0, 0
    for lowered in _lowered(choice):
        values = [_source(source) for source in lowered.sources]
        found = executed(device, lambda *given, own=lowered: own(given), values)
        seconds, calls = seconds + found.seconds, calls + found.calls
    return {"step_s": seconds, "step_calls": calls}


def _source(source: Any) -> Tensor:
    node = source.nodes[0]
    type_ = node.types[0]
    shape = (len(source.nodes), *type_.shape) if source.packed else type_.shape
    dtype = getattr(torch, type_.dtype)
    learns = node.op == "cgo.parameter" and node.keyword("trainable") is True
    with FAKES:
        return torch.empty(shape, dtype=dtype).requires_grad_(learns)


def old_rules() -> Rules:
    """The rules of a CPU's cache, as they were once applied on a GPU."""
    return Rules(chunked_bytes=2**18, large_bytes=2**19, margin=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=Path, required=True)
    parser.add_argument("--only", help="names of workloads, with commas between")
    parser.add_argument("--device", choices=sorted(PROFILES), default="h100")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--old-rules", action="store_true", help="widths by a CPU's cache")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    profile = PROFILES[options.device]
    rules = old_rules() if options.old_rules else rules_for(DEVICE)
    found: dict[str, Any] = {"environment": bench.environment(), "profile": profile.as_json()}
    found |= {"steps": options.steps, "rows": {}}
    for name in (options.only or ",".join(WORKLOADS)).split(","):
        data = GraphData.read(options.plans / name / "graph.json")
        found["rows"][name] = made = row(data, profile, options.steps, rules)
        print(_line(name, made), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n")


def _line(name: str, made: dict[str, Any]) -> str:
    step, full = (1e3 * made.get(key, math.nan) for key in ("step_s", "step_at_full_width_s"))
    return (
        f"{name:9} {made['charged_s']:5.1f} s of {made['budget_s']:.1f}, {made['measured']} "
        f"measured; {made['groups']} groups, {made['pieces']} pieces, {made['divided']} divided, "
        f"{made['loops']} loops; {made['calls']} calls ({made['calls_at_full_width']} at full "
        f"width); step {step:.1f} ms ({full:.1f}); "
        f"host {made['host_s']:.1f} s"
    )


if __name__ == "__main__":
    main()
