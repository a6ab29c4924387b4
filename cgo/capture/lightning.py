"""Lightning modules: what of them is trained here, and what is not."""

from __future__ import annotations

from torch import nn

from cgo.errors import ModelError


def refuse_ignored_training(id_: str, module: nn.Module) -> None:
    """Refuse a LightningModule that says how it is trained: nobody here would listen.

    Raises:
        ModelError: it has a `training_step` or `configure_optimizers` of its own.
    """
    bases = [base for base in type(module).__mro__ if base.__name__ == "LightningModule"]
    if not bases:
        return
    names = ("training_step", "configure_optimizers")
    own = [n for n in names if getattr(type(module), n, None) is not getattr(bases[0], n, None)]
    if own:
        raise ModelError(
            f"model {id_!r}: {type(module).__name__} is a LightningModule whose "
            f"{' and '.join(own)} would be ignored: models are trained by their TrainingSpec. Say "
            "loss and optimizer there, and let the factory return a plain nn.Module: the network "
            "inside, or torch.nn.Sequential(lightning_module)"
        )
