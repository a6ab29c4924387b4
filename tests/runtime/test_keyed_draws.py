"""Numbers of keyed streams: Philox as published, and distributions as docs/random.md has them."""

import math

import pytest
import torch
from support import keyed

from cgo.errors import GraphError
from cgo.runtime.keyed_draws import Draw, check, fill, philox, stream_key

#: Of the Random123 distribution: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
STEP = 2**33 + 5
DRAWS = [
    ("dropout", {"p": 0.3}), ("dropout", {"p": 1.0}), ("bernoulli", {"p": 0.7}),
    ("bernoulli", {"p": 0.0}), ("bernoulli", {"p": 1.0}), ("uniform", {}),
    ("uniform", {"low": -0.3, "high": 0.11}), ("uniform", {"low": 0.5, "high": 0.5}),
    ("normal", {}), ("normal", {"mean": 1.0, "std": 0.3}),
    ("log_normal", {"mean": 0.2, "std": 0.5}),
    ("exponential", {"rate": 2.0}), ("cauchy", {"median": 0.5, "scale": 2.0}),
    ("geometric", {"p": 0.3}), ("randint", {"low": -4, "high": 11}),
    ("randint", {"low": -(2**62), "high": 2**62}), ("randperm", {}),
]  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def words(text):
    return tuple(int(word, 16) for word in text.split())


def drawn(distribution, given, count=1027, dtype=torch.float64, key=None, step=STEP):
    if distribution in ("randint", "randperm"):
        dtype = torch.int64
    out = torch.empty(count, dtype=dtype)
    key = stream_key(7, 2, 1) if key is None else key
    fill(out, Draw(distribution, given, key), torch.tensor(step))
    return out


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_words(counter, key, result):
    counter, key, result = map(words, (counter, key, result))
    assert philox(counter, key) == result
    of_tensors = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(map(int, of_tensors)) == result
    assert tuple(int(word) for word in keyed.philox(counter, key)) == result


def test_a_key_follows_from_seed_operator_and_kind_of_program():
    given = [
        (seed, order, domain) for seed in (0, 1, 2**63 - 1) for order in (0, 1) for domain in (0, 1)
    ]
    keys = [stream_key(*item) for item in given]
    assert len(set(keys)) == len(keys)
    assert keys == [low | high << 32 for low, high in (keyed.key_of(*item) for item in given)]


def expected(distribution, given, count, dtype):
    """By NumPy, from the formulas."""
    given = {"low": 0.0, "high": 1.0, "mean": 0.0, "std": 1.0} | given
    key = keyed.key_of(7, 2, 1)
    if distribution != "dropout":
        return keyed.draw(distribution, key, STEP, count, dtype, given)
    kept = torch.from_numpy(keyed.bernoulli(key, STEP, count, 1 - given["p"]))
    scale = 0.0 if given["p"] == 1 else 1 / (1 - given["p"])
    return kept.to(dtype) * keyed.as_dtype(scale, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("distribution", "given"), DRAWS)
def test_distributions_are_as_the_formulas_say(distribution, given, dtype):
    found = drawn(distribution, given, dtype=dtype)
    wanted = expected(distribution, given, len(found), found.dtype)
    if distribution in ("dropout", "bernoulli", "uniform", "randint", "randperm", "geometric"):
        assert torch.equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted)


MOMENTS = {
    "uniform": (0.5, 12**-0.5), "normal": (0.0, 1.0), "exponential": (0.5, 0.5),
    "geometric": (1 / 0.3, 0.7**0.5 / 0.3), "bernoulli": (0.7, 0.21**0.5),
}  # fmt: skip


@pytest.mark.parametrize("distribution", MOMENTS)
def test_mean_and_deviation_are_those_of_the_distribution(distribution):
    given = next(kwargs for name, kwargs in DRAWS if name == distribution)
    found = drawn(distribution, given, count=200_000, dtype=torch.float64)
    mean, deviation = MOMENTS[distribution]
    assert abs(float(found.mean()) - mean) < 5 * deviation / math.sqrt(len(found))
    assert abs(float(found.std()) / deviation - 1) < 0.02


def test_neighbouring_steps_elements_and_streams_are_not_correlated():
    one = drawn("normal", {}, count=50_000)
    others = [drawn("normal", {}, count=50_000, step=STEP + 1),
              drawn("normal", {}, count=50_000, key=stream_key(7, 3, 1)),
              drawn("normal", {}, count=50_000, key=stream_key(8, 2, 1)),
              one.roll(1)]  # fmt: skip
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / math.sqrt(50_000)


def test_numbers_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    whole = [drawn(*item, dtype=torch.float32) for item in DRAWS if item[0] != "randperm"]
    monkeypatch.setattr("cgo.runtime.keyed_draws._CHUNK", 64)
    parts = [drawn(*item, dtype=torch.float32) for item in DRAWS if item[0] != "randperm"]
    assert all(map(torch.equal, whole, parts))


def test_the_end_of_a_range_is_not_drawn():
    """Of two bytes, the largest number below 1 would be rounded to it."""
    for dtype in (torch.float16, torch.bfloat16):
        found = drawn("uniform", {}, count=20_000, dtype=dtype)
        assert float(found.max()) < 1
    assert float(drawn("exponential", {"rate": 1.0}, 20_000, torch.float32).min()) > 0


def test_complex_numbers_are_pairs_of_half_the_variance():
    given = {"mean": 0.5, "std": 2.0}
    found = drawn("normal", given, dtype=torch.complex128)
    parts = drawn("normal", {"std": 2**0.5}, count=2 * len(found)).view(-1, 2)
    torch.testing.assert_close(torch.view_as_real(found - 0.5), parts)


def test_an_unknown_distribution_is_refused():
    with pytest.raises(GraphError, match="unknown distribution 'poisson'"):
        check(Draw("poisson", {}, 0))
