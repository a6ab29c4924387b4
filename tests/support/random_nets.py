"""Networks drawn operator by operator; any list of steps makes a valid one."""

import torch
from torch import nn
from torch.nn import functional as F

_CHOICES = (range(1000), (0, 0, 0, 0, 1, 2), range(1, 5), range(1000))


def draw_steps(dice, least=2, most=9):
    """Steps: which operator, from which two earlier values, with which of its variants."""
    length = dice.randint(least, most)
    return [[dice.choice(choices) for choices in _CHOICES] for _ in range(length)]


ACTIVATIONS = (
    F.relu, F.gelu, F.silu, torch.tanh, F.leaky_relu, F.softplus, F.elu, F.hardswish,
    lambda x: x.clamp(-1.0, 1.0), lambda x: x * torch.sigmoid(x), lambda x: (x * x + 0.1).sqrt(),
    lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: x / (1 + x.abs()), lambda x: 1 - x,
)  # fmt: skip


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *values):
        return self.function(*values)


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x):
        return x * self.weight


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training else x


class Attention(nn.Module):
    def __init__(self, d, heads, causal, dropout):
        super().__init__()
        self.project, self.heads = nn.Linear(d, 3 * 4 * heads), heads
        self.causal, self.dropout = causal, dropout

    def forward(self, x):
        n, t, _ = x.shape
        parts = self.project(x).view(n, t, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(*parts.unbind(0), None, dropout, self.causal)
        return out.transpose(1, 2).reshape(n, t, -1)


class Recurrent(nn.Module):
    def __init__(self, kind, d, **given):
        super().__init__()
        self.body = kind(d, 3, batch_first=True, **given)

    def forward(self, x):
        return self.body(x)[0]


class Quantised(nn.Module):
    """Tokens become classes, and classes vectors."""

    def __init__(self, padding):
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=padding)

    def forward(self, x):
        return self.table((x.detach().mean(2).sigmoid() * 7).long().clamp(0, 6))


class Twice(nn.Module):
    """One layer used twice: its gradient is a sum."""

    def __init__(self, d):
        super().__init__()
        self.layer = nn.Linear(d, d)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def of_images(x, variant, dropout):
    """How to build layers from (N, C, H, W); None stands for one that does not fit."""
    c, h = x.shape[1], min(x.shape[2:])
    even = c % 2 == 0
    yield lambda: nn.Conv2d(c, 4, 3, padding=1, bias=variant % 2 == 0)
    yield (lambda: nn.Conv2d(c, 4, 3, 2, 1)) if h >= 4 else None
    yield lambda: nn.Conv2d(c, 6, 1, bias=False)
    yield lambda: nn.Conv2d(c, c, 3, padding=1, groups=c)
    yield (lambda: nn.Conv2d(c, 4, 3, padding=1, groups=2)) if even else None
    yield lambda: nn.Conv2d(c, 4, 3, padding=2, dilation=2)
    yield (lambda: nn.ConvTranspose2d(c, 4, 2, 2)) if h <= 4 else None
    yield lambda: nn.BatchNorm2d(c, momentum=(0.1, 0.3)[variant % 2], affine=variant % 3 > 0)
    yield lambda: nn.GroupNorm(2 if even else 1, c)
    yield lambda: nn.InstanceNorm2d(c, affine=variant % 2 == 0)
    yield (lambda: nn.MaxPool2d(2)) if h >= 4 else None
    yield lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=variant % 2 == 0)
    yield lambda: nn.AdaptiveAvgPool2d(2)
    yield lambda: nn.Dropout2d(dropout)
    yield lambda: Scale(c, 1, 1)
    yield lambda: nn.PReLU(c)
    yield lambda: Call(lambda value: F.pad(value, (1, 0, 0, 1)) if h <= 6 else value[:, :, 1:])
    yield lambda: Call(lambda value: value.roll(1, 3).flip(2))
    yield (lambda: nn.Upsample(scale_factor=2)) if h <= 4 else None
    yield lambda: Call(lambda value: value.softmax(1))
    yield lambda: Call(lambda value: value - value.mean((2, 3), keepdim=True))
    tokens = lambda: Call(lambda value: value.flatten(2).transpose(1, 2))  # noqa: E731
    yield from (tokens,) * 4  # the one way on to attention and recurrence


def of_tokens(x, variant, dropout):
    """Layers from (N, T, D)."""
    t, d = x.shape[1:]
    yield lambda: nn.Linear(d, 6, bias=variant % 2 == 0)
    # Over one element a norm is zero, and its gradient nothing but rounding errors.
    yield (lambda: nn.LayerNorm(d)) if d > 1 else None
    yield (lambda: nn.RMSNorm(d)) if d > 1 else None
    yield lambda: Attention(d, 1 + variant % 2, variant % 3 == 0, dropout * (variant % 2))
    yield (lambda: Recurrent(nn.LSTM, d, bidirectional=variant % 2 == 0)) if t <= 9 else None
    yield (lambda: Recurrent(nn.GRU, d, num_layers=1 + variant % 2)) if t <= 9 else None
    yield lambda: nn.Conv1d(t, 4, 3, padding=1)
    yield lambda: nn.BatchNorm1d(t)
    yield lambda: Quantised(variant % 7 if variant % 2 else None)
    yield lambda: Scale(d)
    yield lambda: Call(lambda value: value.cumsum(1) / t)
    yield lambda: Call(lambda value: (value @ value.mT / d).softmax(-1) @ value)
    yield lambda: Call(lambda value: value.mean(1))
    yield lambda: Call(lambda value: value[:, -1])
    yield lambda: Call(lambda value: value.amax(1))
    yield (
        (lambda: Call(lambda value: torch.stack(value.chunk(2, 1), 3).sum(3)))
        if t % 2 == 0
        else None
    )


def of_vectors(x, variant, dropout):
    """Layers from (N, D)."""
    d = x.shape[1]
    yield lambda: nn.Linear(d, 8, bias=variant % 2 == 0)
    yield lambda: nn.BatchNorm1d(d)
    yield (lambda: nn.LayerNorm(d, bias=variant % 2 == 0)) if d > 1 else None
    yield lambda: Twice(d)
    yield lambda: Scale(d)
    yield lambda: Call(lambda value: value.softmax(1))
    yield lambda: Call(lambda value: value / (value.norm(dim=1, keepdim=True) + 0.1))
    yield lambda: Call(lambda value: value.unsqueeze(1).expand(-1, 3, -1))
    yield lambda: Call(lambda value: torch.cat((value, value.sum(1, keepdim=True)), 1))


def of_all(x, variant, dropout):
    """Layers from anything."""
    yield lambda: Call(ACTIVATIONS[variant % len(ACTIVATIONS)])
    yield lambda: nn.Dropout(dropout)
    yield lambda: Noise()


def of_two(a, b):
    """Layers from two values; other shapes make other choices."""
    if a.shape == b.shape:
        yield from (Call(torch.add), Call(torch.sub), Call(torch.maximum), Call(lambda x, y: x * y))
    if a.ndim == b.ndim and a.shape[2:] == b.shape[2:]:
        yield Call(lambda x, y: torch.cat((x, y), 1))
    if a.ndim == 4 and b.ndim == 2 and a.shape[1] == b.shape[1]:
        yield Call(lambda x, y: x * y.sigmoid()[:, :, None, None])


class Drawn(nn.Module):
    """A network of the steps given, and a linear head on its last value."""

    def __init__(self, steps, dropout=0.2):
        super().__init__()
        values = [torch.zeros(2, 1, 8, 8)]
        self.layers, self.sources = nn.ModuleList(), []
        for number, *places, variant in steps:
            sources = [max(len(values) - 1 - place, 0) for place in places]
            layer, used = self._layer(values, sources, number, variant, dropout)
            self.layers.append(layer)
            self.sources.append(used)
            with torch.no_grad():
                values.append(layer.eval()(*(values[i] for i in used)))
            layer.train()
            self._off_the_kinks(layer)
        self.live = self._live()
        self.head = nn.Linear(values[-1].flatten(1).shape[1], 10)

    @staticmethod
    def _off_the_kinks(layer):
        """A bias of zero gives values of rounding errors where a norm sees its mean; an activation
        with a kink at zero then has a gradient that goes by their signs.
        """
        bias = getattr(layer, "bias", None)
        if "Norm" in type(layer).__name__ and bias is not None:
            nn.init.uniform_(bias, -0.5, 0.5)

    def _live(self):
        """Values that the last one depends on; the other layers have parameters, but do not run.

        torch.export drops what nothing reads. Were it a dropout, the stream would go another way.
        """
        live = {len(self.layers)}
        for number in range(len(self.layers), 0, -1):
            if number in live:
                live.update(self.sources[number - 1])
        return live

    @staticmethod
    def _layer(values, sources, number, variant, dropout):
        a, b = (values[i] for i in sources)
        two = list(of_two(a, b)) if sources[0] != sources[1] else []
        if two and number % 3 == 0:
            return two[variant % len(two)], sources
        alone = {4: of_images, 3: of_tokens, 2: of_vectors}[a.ndim]
        found = [*alone(a, variant, dropout), *of_all(a, variant, dropout)]
        fitting = [build for build in found if build is not None]
        return fitting[number % len(fitting)](), sources[:1]

    def forward(self, x):
        values = [x]
        for number, (layer, sources) in enumerate(zip(self.layers, self.sources), start=1):
            live = number in self.live
            values.append(layer(*(values[i] for i in sources)) if live else None)
        return self.head(values[-1].flatten(1))


def drawn(**kwargs):
    return Drawn(**kwargs)
