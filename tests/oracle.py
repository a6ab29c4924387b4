"""Training alone: the plain PyTorch loop that merged training must equal.

Imports nothing of the package under test. Specs are plain dictionaries.
"""

import contextlib
import importlib
from dataclasses import dataclass, field

import torch
import torchmetrics
from torch.nn import functional as F


@dataclass
class Run:
    """What training alone gave."""

    losses: list = field(default_factory=list)  # one float a step
    history: list = field(default_factory=list)  # one dict an epoch
    scales: list = field(default_factory=list)  # after each step; 1.0 but in float16
    gradients: dict = field(default_factory=dict)  # of the first step, before clipping
    state: dict = field(default_factory=dict)


def train_alone(
    factory,
    kwargs,
    data,
    *,
    seed,
    batch_size,
    epochs,
    data_seed=0,
    drop_last=False,
    optimizer="SGD",
    optimizer_kwargs=None,
    scheduler=None,
    scheduler_kwargs=None,
    scheduler_interval="epoch",
    grad_clip_norm=None,
    loss=F.cross_entropy,
    metric="accuracy",
    measure=None,
    precision="float32",
    loss_scale=2.0**16,
    loss_scale_growth_interval=2000,
    augment=None,
    streams=None,
):
    """Train one model; `data` is (train, validation), each (inputs, targets) as whole tensors.

    `augment(inputs, epoch, number)` gives what the training batch of that number becomes; it leaves
    the random streams as they are. `measure(outputs, targets)` gives the metric's value over the
    whole validation set, if it is neither accuracy nor the mean squared error. `streams(seed)` is
    what random numbers come from, if not torch's generator (see `support.keyed.KeyedStreams`).
    """
    (inputs, targets), (val_inputs, val_targets) = data
    double = precision == "float64"
    torch.manual_seed(seed)
    net = factory(**kwargs)
    if double:
        net = net.double()
    opt = getattr(torch.optim, optimizer)(net.parameters(), **(optimizer_kwargs or {}))
    schedule = None
    if scheduler:
        module, _, name = scheduler.rpartition(":")
        place = importlib.import_module(module or "torch.optim.lr_scheduler")
        schedule = getattr(place, name)(opt, **(scheduler_kwargs or {}))
    run = Run()
    keyed = None if streams is None else streams(seed)
    # Without effect where the precision is another.
    scaler = torch.amp.GradScaler(
        "cpu",
        init_scale=loss_scale,
        growth_interval=loss_scale_growth_interval,
        enabled=precision == "float16",
    )

    def step_loss(x, y):
        x, y = (_cast(value, double) for value in (x, y))
        context = contextlib.nullcontext()
        if precision in ("bfloat16", "float16"):
            context = torch.autocast("cpu", dtype=getattr(torch, precision))
        split = "train" if torch.is_grad_enabled() else "validation"
        with context, contextlib.nullcontext() if keyed is None else keyed.forward(split):
            out = _call(net, x)
            return loss(out, y), out

    for epoch in range(epochs):
        total, lr = 0.0, opt.param_groups[0]["lr"]
        n = len(targets)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(data_seed + epoch))
        for number, batch in enumerate(order.split(batch_size)):
            if drop_last and len(batch) < batch_size:
                break
            opt.zero_grad()
            x = _pick(inputs, batch)
            if augment is not None:
                x = augment(x, epoch, number)
            value, _ = step_loss(x, _pick(targets, batch))
            scaler.scale(value).backward()
            scaler.unscale_(opt)
            if not run.gradients:
                run.gradients = {
                    name: None if p.grad is None else p.grad.clone()
                    for name, p in net.named_parameters()
                }
            if grad_clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip_norm)
            scaler.step(opt)
            scaler.update()
            run.scales.append(scaler.get_scale())
            if schedule is not None and scheduler_interval == "step":
                schedule.step()
            run.losses.append(float(value.detach()))
            total += float(value.detach()) * len(batch)
        if schedule is not None and scheduler_interval == "epoch":
            schedule.step()
        seen = n - n % batch_size if drop_last else n
        row = {"train_loss": total / seen, "lr": lr}
        run.history.append(
            row | _evaluate(net, step_loss, val_inputs, val_targets, batch_size, metric, measure)
        )
    run.state = {name: value.clone() for name, value in net.state_dict().items()}
    return run


def _evaluate(net, step_loss, inputs, targets, batch_size, metric, measure):
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    total, outputs = 0.0, []
    with torch.no_grad():
        for batch in torch.arange(len(targets)).split(batch_size):
            value, out = step_loss(_pick(inputs, batch), _pick(targets, batch))
            total += float(value.detach()) * len(batch)
            outputs.append(out)
    for part, training in modes:
        part.training = training
    output = torch.cat(outputs)
    row = {"val_loss": total / len(targets)}
    if measure is not None:
        row[f"val_{metric}"] = float(measure(output, targets))
    elif metric == "accuracy":
        row["val_accuracy"] = float((output.argmax(1) == targets).float().mean())
    elif metric == "mean_squared_error":
        measure = torchmetrics.MeanSquaredError()
        row["val_mean_squared_error"] = float(
            measure(output, _cast(targets, output.dtype == torch.float64))
        )
    return row


def _call(net, x):
    if isinstance(x, tuple):
        return net(*x)
    return net(**x) if isinstance(x, dict) else net(x)


def _pick(values, index):
    if isinstance(values, tuple):
        return tuple(value[index] for value in values)
    if isinstance(values, dict):
        return {key: value[index] for key, value in values.items()}
    return values[index]


def _cast(values, double):
    if isinstance(values, tuple):
        return tuple(_cast(value, double) for value in values)
    if isinstance(values, dict):
        return {key: _cast(value, double) for key, value in values.items()}
    return values.double() if double and values.is_floating_point() else values
