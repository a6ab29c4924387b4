"""Operators that need more than a change of name to be functional and reproducible.

A rewrite gets the converter, the operator and its converted arguments, and returns the result's
reference; KEEP where the operator draws nothing and stays as it is; or None where it has nothing to
say. Random tensors are drawn in the shape, dtype and
memory layout that the eager operator would use, because on a CPU the stream depends on all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cgo.errors import CaptureError
from cgo.graph import Symbol

#: The operator stays, and is known to draw no random numbers with these arguments.
KEEP = object()


def bound(overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, defaults filled in."""
    values = {}
    for index, argument in enumerate(overload._schema.arguments):
        if index < len(args):
            values[argument.name] = args[index]
        elif argument.name in kwargs:
            values[argument.name] = kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value if argument.has_default_value() else None
    return values


def _dropout(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    named = bound(overload, args, kwargs)
    x, p = named["input"] if "input" in named else named["self"], named["p"]
    if not named["train"] or p == 0 or to.fake(x).numel() == 0:
        return x
    return _dropped(to, x, torch.empty_like(to.fake(x)), float(p), name="dropout")


def _dropped(to: Any, x: Any, like: Any, p: float, name: str | None = None) -> Any:
    """`x` without what drops out, by draws in the form of `like`; ATen draws nothing at p = 1."""
    if p == 1:
        return to.emit("aten.mul.Scalar", x, 0.0, name=name)
    return to.emit("aten.mul.Tensor", x, to.draw("dropout", like, p=p), name=name)


def _feature_dropout(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    named = bound(overload, args, kwargs)
    x, p = named["input"] if "input" in named else named["self"], named["p"]
    fake = to.fake(x)
    if not named["train"] or p == 0 or fake.numel() == 0:
        return x
    shape = fake.shape[:2] + (1,) * (fake.dim() - 2)
    return _dropped(to, x, fake.new_empty(shape), float(p), name="feature_dropout")


def _alpha_dropout(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """As ATen's `_alpha_dropout_impl`: x * a * keep + (keep - 1) * alpha * a + alpha * a * p."""
    named = bound(overload, args, kwargs)
    x, p = named["input"] if "input" in named else named["self"], float(named["p"])
    if not named["train"] or p == 0 or to.fake(x).numel() == 0:
        return x
    if p == 1:
        return to.emit("aten.mul.Scalar", x, 0.0, name="alpha_dropout")
    alpha = 1.7580993408473766
    a = 1.0 / math.sqrt((alpha * alpha * p + 1) * (1 - p))
    keep = to.draw("bernoulli", torch.empty_like(to.fake(x)), p=1 - p)
    shifted = to.emit("aten.sub.Scalar", keep, 1.0)
    scaled = to.emit("aten.mul.Scalar", shifted, alpha * a)
    offset = to.emit("aten.add.Scalar", scaled, alpha * a * p)
    slope = to.emit("aten.mul.Scalar", keep, a)
    return to.emit("aten.add.Tensor", to.emit("aten.mul.Tensor", x, slope), offset)


def _attention(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Attention with dropout, spelled out as ATen's `_scaled_dot_product_attention_math`."""
    named = bound(overload, args, kwargs)
    p = float(named["dropout_p"])
    if p == 0:
        return KEEP
    query, key, value = named["query"], named["key"], named["value"]
    if named.get("enable_gqa"):
        raise CaptureError("grouped-query attention with dropout")
    scale = named["scale"]
    scale = 1.0 / math.sqrt(to.fake(query).shape[-1]) if scale is None else scale
    query = to.emit("aten.mul.Scalar", query, math.sqrt(scale))
    key = to.emit("aten.mul.Scalar", to.emit("aten.transpose.int", key, -2, -1), math.sqrt(scale))
    weights = to.emit("aten.matmul.default", query, key)
    weights = _masked(to, weights, named["attn_mask"], bool(named["is_causal"]))
    weights = to.emit("aten.softmax.int", weights, -1)
    weights = _dropped(to, weights, torch.empty_like(to.fake(weights)), p)
    return to.emit("aten.matmul.default", weights, value, name="attention")


def _masked(to: Any, weights: Any, mask: Any, causal: bool) -> Any:
    if causal:
        rows, columns = to.fake(weights).shape[-2:]
        ones = to.emit(
            "aten.ones.default",
            (rows, columns),
            dtype=Symbol("dtype", "bool"),
            device=Symbol("device", "trial"),
        )
        mask = to.emit("aten.tril.default", ones)
    if mask is None:
        return weights
    if to.fake(mask).dtype == torch.bool:
        hidden = to.emit("aten.logical_not.default", mask)
        return to.emit("aten.masked_fill.Scalar", weights, hidden, float("-inf"))
    return to.emit("aten.add.Tensor", weights, mask)


def _batch_norm(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    named = bound(overload, args, kwargs)
    mean, var = named["running_mean"], named["running_var"]
    if not named["training"] or mean is None:
        return _without_cudnn(to, overload, args)
    x, weight, bias = named["input"], named["weight"], named["bias"]
    out, new_mean, new_var = to.add_batch_norm(
        (x, weight, bias, mean, var, named["momentum"], named["eps"])
    )
    to.replace_buffer(mean, new_mean)
    to.replace_buffer(var, new_var)
    return out


def _instance_norm(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    named = bound(overload, args, kwargs)
    if named["use_input_stats"] and named["running_mean"] is not None:
        raise CaptureError("instance_norm with running statistics writes them behind its schema")
    return _without_cudnn(to, overload, args)


def _without_cudnn(to: Any, overload: Any, args: Sequence[Any]) -> Any:
    """A norm whose last argument, which a setting of the process decides, is always the same."""
    return to.emit(str(overload), *args[:8], False, result=to.seen)


def _recurrent(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Layers with dropout between them as layers of their own, as ATen runs them."""
    named = bound(overload, args, kwargs)
    layers, p = named.get("num_layers", 1), named.get("dropout")
    if not named.get("train") or not p or layers == 1:
        return KEEP
    if overload._overloadname != "input":
        raise CaptureError(f"{overload} with dropout between its layers")
    directions = 2 if named["bidirectional"] else 1
    x = (
        to.emit("aten.transpose.int", named["input"], 0, 1)
        if named["batch_first"]
        else named["input"]
    )
    several = isinstance(named["hx"], tuple)  # of an LSTM: hidden states and cells
    states = named["hx"] if several else (named["hx"],)
    own = len(named["params"]) // layers
    ends: list[tuple[Any, ...]] = []
    for layer in range(layers):
        if layer:
            x = _dropped(to, x, to.fake(x), float(p))
        rows = layer * directions, (layer + 1) * directions
        begin = tuple(to.emit("aten.slice.Tensor", state, 0, *rows) for state in states)
        params = named["params"][layer * own : (layer + 1) * own]
        rest = (named["has_biases"], 1, 0.0, True, named["bidirectional"], False)
        x, *end = to.emit(str(overload), x, begin if several else begin[0], params, *rest)
        ends.append(tuple(end))
    x = to.emit("aten.transpose.int", x, 0, 1) if named["batch_first"] else x
    return (x, *(to.emit("aten.cat.default", state, 0) for state in zip(*ends)))


def _like(distribution: str) -> Callable[..., Any]:
    def rewrite(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        fake = overload(*to._fakes(tuple(args)), **{k: to._fakes(v) for k, v in kwargs.items()})
        return to.draw(distribution, fake)

    return rewrite


def _randint(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    named = bound(overload, args, kwargs)
    fake = overload(*to._fakes(tuple(args)), **{k: to._fakes(v) for k, v in kwargs.items()})
    return to.draw("randint", fake, low=named.get("low") or 0, high=named["high"])


def _bernoulli(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """With a tensor of probabilities: ATen draws a uniform number for each and compares."""
    named = bound(overload, args, kwargs)
    p, like = named.get("p"), to.fake(named["self"])
    if isinstance(p, float):
        return to.draw("bernoulli", torch.empty_like(like), p=p)
    p = named["self"] if p is None else p
    fake = to.fake(p)
    noise = to.draw("uniform", fake if fake.shape == like.shape else fake.expand(like.shape))
    drawn = to.emit("aten.lt.Tensor", noise, p)
    return to.emit("aten.to.dtype", drawn, Symbol("dtype", str(like.dtype).removeprefix("torch.")))


def _filled(distribution: str, **names: str) -> Callable[..., Any]:
    """An operator that fills a tensor with draws; `names` are of its parameters, ours to ATen's."""

    def rewrite(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        named = bound(overload, args, kwargs)
        if "self" not in named:  # one that makes a tensor of its own
            return None
        given = {own: float(named[its]) for own, its in names.items()}
        return to.draw(distribution, to.fake(named["self"]), **given)

    return rewrite


def _random(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`x.random_(low, high)`; without bounds ATen's range depends on the dtype."""
    named = bound(overload, args, kwargs)
    high = named.get("to")
    if high is None:
        return None
    return to.draw("randint", to.fake(named["self"]), low=named.get("from") or 0, high=high)


def _randperm(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    fake = overload(*to._fakes(tuple(args)), **to._fakes(dict(kwargs)))
    return to.draw("randperm", fake) if fake.dtype is torch.int64 else None


def _empty(zeros: str) -> Callable[..., Any]:
    """Memory of no known content becomes zeros: what is computed of it is then known, too."""

    def rewrite(to: Any, overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        kept = {k: v for k, v in kwargs.items() if k != "memory_format" or zeros == "zeros_like"}
        return to.emit(f"aten.{zeros}.default", *args, **kept)

    return rewrite


#: Rewrites by operator name without overload and trailing underscore.
REWRITES: dict[str, Callable[..., Any]] = {
    "dropout": _dropout,
    "feature_dropout": _feature_dropout,
    "alpha_dropout": _alpha_dropout,
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn_tanh": _recurrent,
    "rnn_relu": _recurrent,
    "rand_like": _like("uniform"),
    "rand": _like("uniform"),
    "randn_like": _like("normal"),
    "randn": _like("normal"),
    "randint": _randint,
    "randint_like": _randint,
    "bernoulli": _bernoulli,
    "uniform": _filled("uniform", low="from", high="to"),
    "normal": _filled("normal", mean="mean", std="std"),
    "exponential": _filled("exponential", rate="lambd"),
    "log_normal": _filled("log_normal", mean="mean", std="std"),
    "cauchy": _filled("cauchy", median="median", scale="sigma"),
    "geometric": _filled("geometric", p="p"),
    "random": _random,
    "empty": _empty("zeros"),
    "new_empty": _empty("new_zeros"),
    "empty_like": _empty("zeros_like"),
    "randperm": _randperm,
}
