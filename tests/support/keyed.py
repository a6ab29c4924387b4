"""Keyed streams once more, written from docs/random.md: what a plain loop draws on a GPU.

Philox4x32-10 in NumPy's uint64, and a mode in which torch's own operators draw from it. Imports
nothing of the package under test.
"""

import contextlib
import math

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(counter, key):
    """Four words each, as arrays of uint64."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [int(word) for word in key]
    for _ in range(10):
        left, right = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(right >> HALF) ^ c[1] ^ np.uint64(k[0]), right & WORD,
             (left >> HALF) ^ c[3] ^ np.uint64(k[1]), left & WORD]  # fmt: skip
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def halves(number):
    return number % 2**32, number // 2**32


def key_of(seed, order, domain):
    return [int(word) for word in philox((order, domain, 0, 0), halves(seed))[:2]]


def blocks(key, step, count):
    """(count, 4) words of the first blocks of a step."""
    number = np.arange(count, dtype=np.uint64)
    counter = number & WORD, number >> HALF, *(np.full(count, half) for half in halves(step))
    return np.stack(philox(counter, key), axis=1)


def words(key, step, count):
    """One for each element, four of a block."""
    return blocks(key, step, -(-count // 4)).reshape(-1)[:count]


def pairs(key, step, count):
    """Two fractions of 53 bits for each element, a block each."""
    w = blocks(key, step, count)
    high, low = w[:, ::2] >> np.uint64(5), w[:, 1::2] >> np.uint64(6)
    return ((high * 2.0**26 + low) * 2.0**-53).T


def integers(key, step, count):
    """Of 63 bits, as Python's."""
    return [int(w[0]) % 2**31 * 2**32 + int(w[1]) for w in blocks(key, step, count)]


def bernoulli(key, step, count, p):
    return words(key, step, count) < math.ceil(p * 2**32)


def uniform(key, step, count, low, high, dtype):
    if dtype is torch.float64:
        u = pairs(key, step, count)[0]
    else:
        u = (words(key, step, count) >> np.uint64(8)) * 2.0**-24
    value = as_dtype(low + u * (high - low), dtype)
    edge = as_dtype(np.array([low, high]), dtype)
    return torch.where(value >= edge[1], edge[0], value)


def as_dtype(values, dtype):
    value = torch.from_numpy(np.asarray(values, dtype=np.float64))
    return (value.float() if dtype.itemsize == 2 else value).to(dtype)


def standard_normal(key, step, count, dtype):
    kind = np.float64 if dtype is torch.float64 else np.float32
    u, v = pairs(key, step, count)
    return np.sqrt(-2 * np.log((1 - u).astype(kind))) * np.cos(v.astype(kind) * kind(2 * math.pi))


def draw(distribution, key, step, count, dtype, given):
    """What one operator draws, flat."""
    u = pairs(key, step, count)[0]
    match distribution:
        case "bernoulli":
            values = bernoulli(key, step, count, given["p"])
        case "uniform":
            return uniform(key, step, count, given["low"], given["high"], dtype)
        case "normal":
            values = given["mean"] + given["std"] * standard_normal(key, step, count, dtype)
        case "log_normal":
            z = standard_normal(key, step, count, torch.float64)
            values = np.exp(given["mean"] + given["std"] * z)
        case "exponential":
            values = -np.log1p(-np.maximum(u, 2.0**-53)) / given["rate"]
        case "cauchy":
            values = given["median"] + given["scale"] * np.tan(math.pi * (u - 0.5))
        case "geometric":
            values = np.maximum(np.ceil(np.log1p(-u) / math.log1p(-given["p"])), 1)
        case "randint":
            low, high = given["low"], given["high"]
            drawn = integers(key, step, count)
            return torch.tensor([low + x % (high - low) for x in drawn]).to(dtype)
        case "randperm":
            drawn = integers(key, step, count)
            return torch.tensor(sorted(range(count), key=drawn.__getitem__))
    return as_dtype(values, dtype)


#: By the name of torch's operator: the distribution, and what its arguments are called there.
OPERATORS = {
    "rand": ("uniform", {"low": 0.0, "high": 1.0}), "randn": ("normal", {"mean": 0.0, "std": 1.0}),
    "uniform": ("uniform", {"low": "from", "high": "to"}),
    "normal": ("normal", {"mean": "mean", "std": "std"}),
    "bernoulli": ("bernoulli", {"p": "p"}),
    "exponential": ("exponential", {"rate": "lambd"}),
    "log_normal": ("log_normal", {"mean": "mean", "std": "std"}),
    "cauchy": ("cauchy", {"median": "median", "scale": "sigma"}),
    "geometric": ("geometric", {"p": "p"}),
    "random": ("randint", {"low": "from", "high": "to"}),
    "randint": ("randint", {"low": "low", "high": "high"}),
    "randperm": ("randperm", {}),
}  # fmt: skip


class KeyedStreams:
    """The streams of one model, for the plain loop: `with streams.forward("train"): ...`."""

    def __init__(self, seed):
        self.seed, self.steps = seed, {"train": 0, "validation": 0}

    @contextlib.contextmanager
    def forward(self, split):
        """Around one forward and its loss; attention by the only form whose draws are seen."""
        step, self.steps[split] = self.steps[split], self.steps[split] + 1
        drawing = _Drawing(self.seed, ("train", "validation").index(split), step)
        with sdpa_kernel(SDPBackend.MATH), drawing:
            yield


class _Drawing(TorchDispatchMode):
    """Operators that would draw from torch's generators draw from keyed streams."""

    def __init__(self, seed, domain, step):
        super().__init__()
        self.seed, self.domain, self.step, self.order = seed, domain, step, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name == "native_dropout":  # how a GPU does it
            x, p, train = args
            assert train
            kept = self.drawn("bernoulli", x, {"p": 1 - p})
            return x * kept * as_dtype(1 / (1 - p), x.dtype).to(x.device), kept.bool()
        kind = name.rstrip("_").removesuffix("_like")
        if kind not in OPERATORS:
            return func(*args, **kwargs)
        named = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        distribution, names = OPERATORS[kind]
        defaults = {a.name: a.default_value for a in func._schema.arguments}
        given = {
            own: named.get(its, defaults.get(its)) if isinstance(its, str) else its
            for own, its in names.items()
        }
        if kind in ("randint", "random"):
            given["low"] = given["low"] or 0
        out = args[0] if name.endswith("_") else func(*args, **kwargs)
        if kind == "bernoulli" and not isinstance(given["p"], float):
            p = named["self"] if given["p"] is None else given["p"]
            noise = self.drawn("uniform", p.expand(out.shape), {"low": 0.0, "high": 1.0})
            return out.copy_(noise < p)
        return out.copy_(self.drawn(distribution, out, given))

    def drawn(self, distribution, like, given):
        key = key_of(self.seed, self.order, self.domain)
        self.order += 1
        flat = draw(distribution, key, self.step, like.numel(), like.dtype, given)
        return flat.reshape(like.shape).to(like.device)
