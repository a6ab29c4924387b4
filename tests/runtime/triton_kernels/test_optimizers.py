"""The kernels take the steps of `torch.optim`, model by model.

By Triton's interpreter where there is no CUDA device, else on that.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_compiler import run_compiling

triton = pytest.importorskip("triton", reason="no Triton: nothing of its kernels was tested")

from cgo.runtime.triton_kernels.optimizers import BLOCK, fused_update  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

#: Of each family: the optimizer, the numbers' names in the kernel's order, and its moments.
FAMILIES = {
    "sgd": (torch.optim.SGD, ("lr", "weight_decay", "momentum"), ("momentum_buffer",)),
    "adam": (torch.optim.Adam, ("lr", "weight_decay", "eps", "beta1", "beta2"),
             ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    "adamw": (torch.optim.AdamW, ("lr", "weight_decay", "eps", "beta1", "beta2"),
              ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    "rmsprop": (torch.optim.RMSprop, ("lr", "weight_decay", "eps", "alpha", "momentum"),
                ("square_avg", "grad_avg", "momentum_buffer")),
    "adagrad": (torch.optim.Adagrad, ("lr", "weight_decay", "eps", "lr_decay"), ("sum",)),
}  # fmt: skip
CLOSE = {torch.float32: {"rtol": 2e-6, "atol": 2e-6}, torch.float64: {"rtol": 1e-13, "atol": 1e-15}}


class Fused:
    """Lanes end to end, each model with numbers of its own."""

    def __init__(self, family, sizes, numbers, flags, dtype, seed=0):
        self.kind, self.names, moments = FAMILIES[family]
        self.family, self.numbers, self.flags = family.replace("adamw", "adam"), numbers, flags
        generator = torch.Generator().manual_seed(seed)
        self.sizes = sizes
        self.values = torch.randn(sum(sizes), generator=generator, dtype=dtype).to(DEVICE)
        self.alone = [torch.nn.Parameter(lane.clone()) for lane in self.values.split(sizes)]
        self.optimizers = [
            self.kind([lane], **kwargs) for lane, kwargs in zip(self.alone, self._kwargs(family))
        ]
        self.kept = [name for name in moments if self._keeps(name)]
        self.moments = [torch.zeros_like(self.values) for _ in self.kept]
        self.counts = torch.zeros(len(sizes), device=DEVICE)
        rows = [[float(of[name]) for of in numbers] for name in self.names]
        self.table = torch.tensor(rows, dtype=torch.float64, device=DEVICE)
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.rows = torch.tensor(
            [
                [start + done, start + done, min(size - done, BLOCK), model]
                for model, (start, size) in enumerate(zip(starts, sizes))
                for done in range(0, size, BLOCK)
            ],
            device=DEVICE,
        )

    def _kwargs(self, family):
        decay, second, third = self.flags
        for of in self.numbers:
            found = {"lr": of["lr"], "weight_decay": of["weight_decay"] if decay else 0.0}
            if family == "sgd":
                found |= {"momentum": of["momentum"] if second else 0.0, "nesterov": third}
            else:
                found["eps"] = of["eps"]
            if "adam" in family:
                found |= {"betas": (of["beta1"], of["beta2"]), "amsgrad": third}
            if family == "rmsprop":
                found |= {"alpha": of["alpha"], "centered": second}
                found["momentum"] = of["momentum"] if third else 0.0
            if family == "adagrad":
                found["lr_decay"] = of["lr_decay"]
            yield found | {"foreach": False}

    def _keeps(self, name):
        _, second, third = self.flags
        needs = {"momentum_buffer": third if self.kind is torch.optim.RMSprop else second,
                 "max_exp_avg_sq": third, "grad_avg": second}  # fmt: skip
        return needs.get(name, True)

    def step(self, gradient, skip=None):
        skip = torch.zeros(len(self.sizes)) if skip is None else skip
        gradient, skip = gradient.to(DEVICE), skip.to(DEVICE)
        self.counts += 1 - skip
        given = self.values, self.moments, gradient, self.rows, self.table, self.counts, skip
        fused_update(*given, self.family, list(self.flags))

    def step_alone(self, gradient, skip=None):
        for model, (lane, part) in enumerate(zip(self.alone, gradient.split(self.sizes))):
            if skip is None or not skip[model]:
                lane.grad = part.to(DEVICE, copy=True)
                self.optimizers[model].step()

    def lanes(self, flat):
        return flat.split(self.sizes)


def of(rate, decay=0.1, eps=1e-3, unit=0.8, other=0.95):
    return {"lr": rate, "weight_decay": decay, "eps": eps, "momentum": unit, "beta1": unit,
            "beta2": other, "alpha": other, "lr_decay": decay}  # fmt: skip


def flags_of(family, flags):
    """Flags that there are: Nesterov's momentum is one; AdamW is Adam with decoupled decay."""
    decay, second, third = flags
    if family == "sgd":
        return decay, second, third and second
    if family in ("adam", "adamw"):
        return decay, family == "adamw", third
    return (decay, second, third) if family == "rmsprop" else (decay, False, False)


numbers = st.builds(
    of,
    st.floats(1e-4, 0.1),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from([1e-8, 1e-3]),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.floats(0.4, 0.999),
)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    models=st.lists(st.tuples(st.integers(1, 40), numbers), min_size=1, max_size=4),
    left_out=st.lists(st.integers(0, 3), max_size=4),
)
def test_steps_are_those_of_torch_optim(family, dtype, flags, models, left_out):
    sizes, given_numbers = zip(*models)
    fused = Fused(family, list(sizes), given_numbers, flags_of(family, flags), dtype)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        gradient = torch.randn(sum(sizes), generator=generator, dtype=dtype)
        skip = torch.zeros(len(sizes))
        if step < len(left_out) and left_out[step] < len(sizes):
            skip[left_out[step]] = 1
            fused.lanes(gradient)[left_out[step]].fill_(math.nan)
        fused.step(gradient, skip)
        fused.step_alone(gradient, skip)
    for ours, theirs in zip(fused.lanes(fused.values), fused.alone):
        torch.testing.assert_close(ours, theirs.detach(), **CLOSE[dtype])
    for name, flat in zip(fused.kept, fused.moments):
        for lane, optimizer, ours in zip(fused.alone, fused.optimizers, fused.lanes(flat)):
            if optimizer.state[lane]:
                torch.testing.assert_close(ours, optimizer.state[lane][name], **CLOSE[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_lanes_longer_than_a_row(family):
    sizes = [BLOCK, 3, 2 * BLOCK + 7]
    flags = flags_of(family, (True, True, True))
    fused = Fused(family, sizes, [of(0.1 / n) for n in (1, 2, 3)], flags, torch.float32)
    for seed in range(3):
        gradient = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed))
        fused.step(gradient)
        fused.step_alone(gradient)
    for ours, theirs in zip(fused.lanes(fused.values), fused.alone):
        torch.testing.assert_close(ours, theirs.detach(), **CLOSE[torch.float32])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bad_lane_changes_no_bit_of_others(family, poison):
    """Be it its gradients, or its numbers."""
    sizes = [5, 9, 4]
    flags = flags_of(family, (True, True, True))
    good = [of(0.1), of(0.05), of(0.02)]
    clean = Fused(family, sizes, good, flags, torch.float32)
    dirty = Fused(family, sizes, good, flags, torch.float32)
    dirty.table[0, 1] = poison
    for seed in range(3):
        gradient = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed))
        clean.step(gradient)
        dirty.lanes(gradient)[1].fill_(poison)
        dirty.step(gradient)
    for flat, other in zip([clean.values, *clean.moments], [dirty.values, *dirty.moments]):
        for lane in (0, 2):
            assert torch.equal(clean.lanes(flat)[lane], dirty.lanes(other)[lane])
    assert not dirty.lanes(dirty.values)[1].isfinite().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_keeps_its_bits_even_where_they_are_nan(family):
    sizes, flags = [6, 6], flags_of(family, (True, True, True))
    fused = Fused(family, sizes, [of(0.1), of(0.1)], flags, torch.float32)
    fused.values[0] = math.nan
    before = [flat.clone() for flat in (fused.values, *fused.moments)]
    fused.step(torch.full((12,), math.nan), torch.tensor([1.0, 1.0]))
    for flat, kept in zip((fused.values, *fused.moments), before):
        assert torch.equal(flat.view(torch.int32), kept.view(torch.int32))
    assert fused.counts.tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_go_on_counting(family, cuda):
    sizes, flags = [5, 2 * BLOCK + 3], flags_of(family, (True, True, True))
    fused = Fused(family, sizes, [of(0.1), of(0.05)], flags, torch.float32)
    gradient = torch.zeros(sum(sizes), device=cuda)
    fused.step(gradient, torch.ones(2))  # compiled, and nothing written
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        none = torch.zeros(2, device=cuda)
        fused.counts.add_(1)
        given = fused.values, fused.moments, gradient, fused.rows, fused.table, fused.counts, none
        fused_update(*given, fused.family, list(fused.flags))
    for seed in range(3):
        gradient.copy_(torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        fused.step_alone(gradient)
    for ours, theirs in zip(fused.lanes(fused.values), fused.alone):
        torch.testing.assert_close(ours, theirs.detach(), **CLOSE[torch.float32])


_COMPILED = """
import triton.language as tl
from cgo.runtime.triton_kernels.optimizers import _KERNELS, BLOCK
from support.triton_compiler import compile_kernel

others = dict(rows="*i64", numbers="*fp64", counts="*fp32", skip="*fp32", models="i32")
for dtype, wide, flag in (("fp32", tl.float32, True), ("fp64", tl.float64, False)):
    for kernel in _KERNELS.values():
        names = kernel.arg_names
        constants = dict.fromkeys(names[10:13], flag) | dict(wide=wide, block=BLOCK)
        types = {name: others.get(name, "*" + dtype) for name in names}
        compile_kernel(kernel, types, constants, enable_fp_fusion=False)
print("compiled")
"""


@pytest.mark.skipif("nvidia" not in triton.backends.backends, reason="no compiler for CUDA here")
def test_the_compiler_for_cuda_takes_the_kernels(tmp_path):
    assert run_compiling(_COMPILED, tmp_path) == "compiled\n"
