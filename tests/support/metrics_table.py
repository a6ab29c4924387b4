"""`docs/metrics.md`, from the tables of `cgo.metrics`.

    PYTHONPATH=tests python -m support.metrics_table

writes it; `tests/test_metrics.py` checks that it is in force.
"""

from pathlib import Path

from support.forms_table import table

from cgo.metrics import LOSSES, REFUSED, ROWS, UNKNOWN_LOSS

PATH = Path(__file__).parents[2] / "docs" / "metrics.md"

HEAD = """\
# Metrics

`TrainingSpec(metrics=("accuracy", "f1_score"))` names what is computed over the whole validation
set after each epoch; the first is the model's metric. A name means the same for every model, and
what has no single meaning is refused when the `TrainingSpec` is made. Generated from the tables in
`cgo/metrics.py` by `PYTHONPATH=tests python -m support.metrics_table`; do not edit.

For anything else, name a function of your own that returns a `torchmetrics.Metric`, as
`"package.module:name"`: it is handed outputs and targets as they are, batch by batch, and its
`compute()` gives one number.

```python
from torchmetrics.classification import MulticlassF1Score


def micro_f1():  # metrics=("my_package.metrics:micro_f1",)
    return MulticlassF1Score(num_classes=10, average="micro", ignore_index=-100)
```
"""

AVERAGES = """\
"Averaged" means scikit-learn's defaults: with two classes the value of class 1, with more the mean
over the classes that occur among targets or predictions (macro), and of labels the mean over
labels. A quotient that divides by nothing is 0; classes and labels for which `auroc` or
`average_precision` is not defined are left out of the mean."""

TARGETS = """\
## What targets and outputs are

How outputs are read follows from the loss, never from their values: logits that happen to lie
between 0 and 1 are logits.

- **classes**: integer targets `(N, ...)` and outputs `(N, C, ...)`, classes along axis 1, as
  `cross_entropy` wants them. The output that is largest is the predicted class. Targets of -100 are
  left out, as the loss leaves them out; others outside the classes are an error. Every pixel or
  token is a target of its own.
- **labels**: targets 0 or 1 in the shape of the outputs, labels along axis 1: `(N, L)` or
  `(N, L, H, W)`. A label is predicted where its probability is above one half. A single label,
  `(N,)` or `(N, 1, ...)`, is a matter of two classes, of which 1 is the positive one.
- **numbers**: targets in the shape of the outputs. "Columns" are those of `(N, D)`.
- A loss by import path does not say. Targets in the shape of the outputs (axes of one element
  aside: outputs `(N, 1)` with targets `(N,)` are one label) are labels, others classes, along axis
  1 or along the last (a language model's `(N, T, V)` with targets `(N, T)`), whichever fits; where
  both fit, or each target has exactly one label and could be a class, one-hot, it is an error.
  Targets of -100 are left out. Outputs are taken for **logits**: of a loss over probabilities, give
  metrics by import path.
- Where no target counts, and where a metric is not defined (`auroc` without both kinds of targets,
  `cohen_kappa` where chance explains all), the value is NaN, and `cgo.best` passes over the model.

"""


def document():
    named = [(f"`{r.name}`", " or ".join(r.kinds), r.better, r.computes) for r in ROWS]
    losses = [(f"`{name}`", *_read(loss)) for name, loss in LOSSES.items()]
    losses += [("by import path", *_read(UNKNOWN_LOSS))]
    refused = [(f"`{name}`", reason) for name, reason in REFUSED.items()]
    return (
        f"{HEAD}\n## Names\n\n"
        f"{AVERAGES}\n\n"
        f"{table(('name', 'targets', 'better', 'what it computes'), named)}\n\n"
        f"{TARGETS}"
        "## Losses\n\nNames in `torch.nn.functional`; with others there, all metrics are by import "
        f"path.\n\n{table(('loss', 'targets', 'outputs are read as'), losses)}\n\n"
        f"## Refused\n\n{table(('name', 'why'), refused)}\n"
    )


def _read(loss):
    return " or ".join(loss.kinds), loss.outputs


if __name__ == "__main__":
    PATH.write_text(document())
