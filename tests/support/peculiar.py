"""Modules that do in their forward what captures used to refuse, or to get wrong without a word.

`MODULES[name]` builds one that takes (N, 5, 6) and gives 3 logits.
"""

import torch
from support import counters
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

SHAPE, CLASSES = (5, 6), 3


class Headed(nn.Module):
    """A layer, something of the subclass's own, and a head."""

    width = 8

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(6, self.width)
        self.head = nn.Linear(self.width, CLASSES)

    def forward(self, x):
        return self.head(self.inner(self.enter(x)).mean(1))


def of(inner, **parts):
    """A module whose inside is a function of (module, x)."""

    class Made(Headed):
        def __init__(self):
            super().__init__()
            for name, make in parts.items():
                setattr(self, name, make())

        def inner(self, x):
            return inner(self, x)

    return Made


# --- evaluation that equals training only at the start --------------------------------------------


class Averaged(Headed):
    """Trains on its weights and evaluates on an average of them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.register_buffer("average", self.weight.detach().clone())

    def inner(self, x):
        if not self.training:
            return F.linear(x, self.average)
        with torch.no_grad():
            self.average.lerp_(self.weight, 0.1)
        return F.linear(x, self.weight)


class AveragedAlways(Averaged):
    """The same, its average moved by evaluation, too."""

    def inner(self, x):
        with torch.no_grad():
            self.average.lerp_(self.weight, 0.1)
        return F.linear(x, self.weight if self.training else self.average)


class CopyForEvaluation(Headed):
    """A copy that only evaluation reads."""

    def __init__(self):
        super().__init__()
        self.mine, self.theirs = nn.Linear(8, 8), nn.Linear(8, 8)
        self.theirs.load_state_dict(self.mine.state_dict())

    def inner(self, x):
        return self.mine(x) if self.training else self.theirs(x)


class ZeroGate(Headed):
    """A gate of zero that only training opens."""

    def __init__(self):
        super().__init__()
        self.side, self.gate = nn.Linear(8, 8), nn.Parameter(torch.zeros(()))

    def inner(self, x):
        return x + self.gate * self.side(x) if self.training else x


class LowRank(Headed):
    """LoRA, whose B begins as zeros, merged into the weights in training only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2))

    def inner(self, x):
        return x + x @ self.a.T @ self.b.T if self.training else x


class CountedInBuffer(Headed):
    """What a buffer counts decides how much of a branch is taken."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def inner(self, x):
        if self.training:
            self.steps += 1
        return x * torch.exp(-self.steps / 20)


# --- memory that is written -----------------------------------------------------------------------


def scan(self, x):
    out = torch.zeros_like(x)
    out[:, 0] = x[:, 0]
    for t in range(1, x.shape[1]):
        out[:, t] += 0.5 * out[:, t - 1].clone() + x[:, t]
    return out


def every_other(self, x):
    out = x.new_empty(x.shape)
    out[:, ::2] = x[:, ::2] * 2
    out[:, 1::2] = x[:, 1::2].sin()
    return out


def through_views(self, x):
    out = x.clone()
    out.transpose(1, 2)[:, 3].mul_(2)
    out.view(len(x), -1)[:, 1:4].add_(1)
    torch.diagonal(out, dim1=1, dim2=2).mul_(3)
    first = out.narrow(1, 0, 2)
    out.permute(2, 0, 1)[:, :, 3:].copy_(first.permute(2, 0, 1))
    out.unsqueeze(0)[0, :, 0] = 1.5
    return out + first.sum(1, keepdim=True)


def through_one_of_several(self, x):
    """In-place operators on one of several views are for those who need no gradient."""
    with torch.no_grad():
        out = x.clone()
        out.unbind(1)[2].clamp_(max=0.5)
        out.chunk(2, dim=-1)[1].neg_()
        first, second = out.split([2, 3], 1)
        second[:, 1:].copy_(first)
    return x + out


def read_before_and_after(self, x):
    out = x.clone()
    before = out[:, :2] * 1
    out[:, :2] = before.flip(1) * 2
    later = out[:, 1:3]
    out.mul_(0.5)
    return out + torch.cat([before, later, before[:, :1]], 1)


def into_given_memory(self, x):
    out = torch.empty_like(x.detach())
    torch.mul(x.detach(), 2, out=out)
    most = torch.empty_like(x[:, 0].detach())
    where = torch.empty_like(most, dtype=torch.int64)
    torch.max(x.detach(), 1, out=(most, where))
    return x + out + most.unsqueeze(1) + where.unsqueeze(1)


def hidden_writes(self, x):
    out = x * 2
    with torch.no_grad():
        out.clamp_(-0.5, 0.5)  # gradients go on as if nothing had happened
    return out * x


def masked(self, x):
    out = x.clone()
    out[:, 1:][x[:, 1:] > 0.3] = 0.1
    out.masked_fill_(x < -0.3, -0.1)
    return out


class MaxNorm(nn.Module):
    """An embedding that writes its weights, in evaluation, too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 8, max_norm=0.5)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.table((x[..., 0] * 3).long().clamp(0, 6)).mean(1))


class ClampedByHook(Headed):
    """A hook keeps weights in bounds, behind autograd's back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.layer.register_forward_pre_hook(self.clamp)

    @staticmethod
    def clamp(layer, inputs):
        layer.weight.data.clamp_(-0.2, 0.2)

    def inner(self, x):
        return self.layer(x)


class ClampedInForward(Headed):
    def inner(self, x):
        with torch.no_grad():
            self.head.weight.clamp_(-0.2, 0.2)
        return x


class OldSpectralNorm(Headed):
    def __init__(self):
        super().__init__()
        self.layer = nn.utils.spectral_norm(nn.Linear(8, 8))

    def inner(self, x):
        return self.layer(x)


class CumulativeNorm(Headed):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, momentum=None)

    def inner(self, x):
        return self.norm(x)


class Registering(Headed):
    """A buffer that the first forward registers."""

    def __init__(self):
        super().__init__()
        self.places = None

    def inner(self, x):
        if self.places is None:
            del self.places
            self.register_buffer("places", torch.linspace(0, 1, x.shape[-1]).to(x))
        return x + self.places


class Rebinding(Headed):
    """A buffer that is bound anew in each forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(8))

    def inner(self, x):
        before = self.centre
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean((0, 1))
        return x - before


# --- random draws ---------------------------------------------------------------------------------


def layer_drop(self, x):
    if not self.training:
        return x * 0.8
    keep = x.new_empty(len(x), 1, 1).uniform_() < 0.8
    return x * keep


def draws(draw):
    return lambda self, x: x + 0.1 * draw(x) if self.training else x


def shuffled(self, x):
    return x + x[torch.randperm(len(x))] * 0.1 if self.training else x


class Recurrent(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self, kind, bidirectional, batch_first):
        super().__init__()
        self.cell = getattr(nn, kind)(
            6, 8, num_layers=2, dropout=0.3, bidirectional=bidirectional, batch_first=batch_first
        )
        self.first = batch_first
        self.head = nn.Linear(16 if bidirectional else 8, CLASSES)

    def forward(self, x):
        out = self.cell(x if self.first else x.transpose(0, 1))[0]
        return self.head((out if self.first else out.transpose(0, 1))[:, -1])


# --- masks and autocast ---------------------------------------------------------------------------


class WordLanguageModel(nn.Module):
    """The TransformerModel of PyTorch's word_language_model example, on vectors for words."""

    def __init__(self, width=16):
        super().__init__()
        self.src_mask = None
        self.enter = nn.Linear(6, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.enter(x).transpose(0, 1)
        if self.src_mask is None or self.src_mask.size(0) != len(x):
            self.src_mask = torch.log(torch.tril(torch.ones(len(x), len(x)))).to(x)
        return self.head(self.encoder(x, mask=self.src_mask)[-1])


class MaskedEncoder(nn.Module):
    """Masks that are made of data, and masks that are checked for being causal."""

    def __init__(self, causal):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head, self.causal = nn.Linear(6, CLASSES), causal

    def forward(self, x):
        masks = {"src_key_padding_mask": x[..., 0] > 1.5}
        if self.causal:
            size = x.shape[1]
            masks = {"mask": nn.Transformer.generate_square_subsequent_mask(size, dtype=x.dtype)}
        return self.head(self.encoder(x, **masks).mean(1))


def rotary(enabled):
    def inner(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] / torch.arange(1, 9)
            turned = F.linear(x.float() * angles.cos(), torch.eye(8))
        return x + turned.to(x.dtype)

    return inner


def alibi(self, x):
    """Biases of attention that the forward makes."""
    places = torch.arange(x.shape[1])
    bias = -(places[None] - places[:, None]).abs().to(x)
    return ((x @ x.transpose(1, 2)) / 8 + bias).softmax(-1) @ x


MODULES = {
    "averaged": Averaged,
    "averaged always": AveragedAlways,
    "copy for evaluation": CopyForEvaluation,
    "zero gate": ZeroGate,
    "low rank": LowRank,
    "counted in a buffer": CountedInBuffer,
    "scan": of(scan),
    "every other": of(every_other),
    "through views": of(through_views),
    "through one of several": of(through_one_of_several),
    "read before and after": of(read_before_and_after),
    "into given memory": of(into_given_memory),
    "hidden writes": of(hidden_writes),
    "masked": of(masked),
    "max norm": MaxNorm,
    "clamped by a hook": ClampedByHook,
    "clamped in forward": ClampedInForward,
    "old spectral norm": OldSpectralNorm,
    "cumulative norm": CumulativeNorm,
    "registering": Registering,
    "rebinding": Rebinding,
    "layer drop": of(layer_drop),
    "exponential": of(draws(lambda x: torch.empty_like(x).exponential_(2.0))),
    "uniform": of(draws(lambda x: torch.empty_like(x).uniform_(-1, 1))),
    "normal": of(draws(lambda x: torch.empty_like(x).normal_(0.5, 2))),
    "log normal": of(draws(lambda x: torch.empty_like(x).log_normal_(0, 0.3))),
    "geometric": of(draws(lambda x: torch.empty_like(x).geometric_(0.7))),
    "cauchy": of(draws(lambda x: torch.empty_like(x).cauchy_(0, 0.1).clamp(-1, 1))),
    "whole numbers": of(draws(lambda x: torch.empty_like(x).random_(5))),
    "probabilities": of(draws(lambda x: torch.bernoulli(x.detach().sigmoid()))),
    "shuffled": of(shuffled),
    "gru": lambda: Recurrent("GRU", True, True),
    "lstm": lambda: Recurrent("LSTM", True, True),
    "lstm, time first": lambda: Recurrent("LSTM", False, False),
    "rnn": lambda: Recurrent("RNN", True, True),
    "word language model": WordLanguageModel,
    "mask of data": lambda: MaskedEncoder(False),
    "causal mask": lambda: MaskedEncoder(True),
    "autocast off": of(rotary(False)),
    "autocast on": of(rotary(True)),
    "alibi": of(alibi),
}


def build(name):
    return MODULES[name]()


def arrays(samples=44, validation=20):
    draw = torch.Generator().manual_seed(5)
    return tuple(
        (torch.randn(n, *SHAPE, generator=draw), torch.randint(0, CLASSES, (n,), generator=draw))
        for n in (samples, validation)
    )


def data():
    return tuple(TensorDataset(*split) for split in arrays())


# --- what stays opaque, for what Python keeps -----------------------------------------------------


class Counting(Headed):
    """Counts its training steps in an attribute."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def inner(self, x):
        if self.training:
            self.steps += 1
        return x * (1 + self.steps / 100)


class CountingSlowly(Counting):
    """By so little that no tolerance of single precision sees it."""

    def inner(self, x):
        self.steps += 1
        return x * (1 + self.steps * 1e-7)


class EveryThird(Counting):
    def inner(self, x):
        self.steps += 1
        return x * 2 if self.steps % 3 == 0 else x


class RaisesAtFive(Counting):
    def inner(self, x):
        self.steps += 1
        if self.steps == 5:
            raise ValueError("the fifth call")
        return x


class CountingInEvaluation(Counting):
    def inner(self, x):
        self.steps += not self.training
        return x * (1 + self.steps / 100)


CALLS = 0


class CountingGlobally(Headed):
    def inner(self, x):
        global CALLS
        CALLS += 1
        return x * (1 + CALLS / 100)


class CountingInClass(Headed):
    calls = 0

    def inner(self, x):
        type(self).calls += 1
        return x * (1 + self.calls / 100)


def counting_closure():
    count = 0

    def inner(self, x):
        nonlocal count
        count += 1
        return x * (1 + count / 100)

    return of(inner)()


class OwnGenerator(Headed):
    """Draws from a generator that it keeps."""

    def __init__(self):
        super().__init__()
        self.draw = torch.Generator().manual_seed(1)

    def inner(self, x):
        return x * (1 + 0.01 * float(torch.rand((), generator=self.draw)))


class Appending(Headed):
    def __init__(self):
        super().__init__()
        self.seen = []

    def inner(self, x):
        self.seen.append(tuple(x.shape))
        return x * (1 + len(self.seen) / 100)


class KeptTensor(Headed):
    """Counts in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.steps = torch.zeros(())

    def inner(self, x):
        self.steps = self.steps + 1
        return x * (1 + self.steps / 100)


class CountingInDefault(Headed):
    def inner(self, x, seen=[0]):  # noqa: B006
        seen[0] += 1
        return x * (1 + seen[0] / 100)


class CountingInFunction(Headed):
    def inner(self, x):
        count_in_function.calls += 1
        return x * (1 + count_in_function.calls / 100)


def count_in_function():
    """Has an attribute that counts."""


count_in_function.calls = 0


class CountingElsewhere(Headed):
    """In a module of its own, which its forward names."""

    def inner(self, x):
        counters.count()
        return x * (1 + counters.COUNT / 100)


class CountingInObject(Headed):
    def inner(self, x):
        STATE.settings["calls"] += 1
        return x * (1 + STATE.settings["calls"] / 100)


class State:
    def __init__(self):
        self.settings = {"calls": 0}


STATE = State()


class HookThatCounts:
    def __init__(self):
        self.calls = 0

    def __call__(self, layer, inputs, output):
        self.calls += 1
        return output * (1 + self.calls / 100)


class CountingHook(Headed):
    def __init__(self):
        super().__init__()
        self.enter.register_forward_hook(HookThatCounts())

    def inner(self, x):
        return x


#: By name: what builds it, and what the reason names.
KEPT = {
    "counting": (Counting, "attribute `steps` of the module"),
    "counting slowly": (CountingSlowly, "attribute `steps` of the module"),
    "every third": (EveryThird, "attribute `steps` of the module"),
    "raises at five": (RaisesAtFive, "attribute `steps` of the module"),
    "counting in evaluation": (CountingInEvaluation, "attribute `steps` of the module"),
    "counting globally": (CountingGlobally, "global `CALLS`"),
    "counting in its class": (CountingInClass, "class attribute `calls` of CountingInClass"),
    "counting in a closure": (counting_closure, "variable `count` around"),
    "own generator": (OwnGenerator, "attribute `draw`|looks at a value|Generator"),
    "counting in a default": (CountingInDefault, "defaults or attributes of"),
    "counting in a function": (CountingInFunction, "global `count_in_function`|attributes of"),
    "counting elsewhere": (CountingElsewhere, "global `COUNT` of support.counters"),
    "counting in an object": (CountingInObject, "global `STATE`"),
    "counting hook": (CountingHook, "hook"),
    "appending": (Appending, "attribute `seen` of the module"),
    "kept tensor": (KeptTensor, "attribute `steps` of the module|steps"),
}


def build_kept(name):
    return KEPT[name][0]()


class KeepsWhatNobodyReads(Headed):
    """Keeps its last features for whoever looks: no state of the next call."""

    def inner(self, x):
        self.features = x.detach()
        self.shape = x.shape
        return x
