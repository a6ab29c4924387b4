"""`docs/forms.md`, from the registry of forms and the calls that test them.

    PYTHONPATH=tests python -m support.forms_table

writes it; `tests/runtime/test_forms.py` checks that it is in force.
"""

from collections import Counter
from pathlib import Path

from support.calls import CALLS

from cgo.runtime.forms import Form, all_forms, forms_of

PATH = Path(__file__).parents[2] / "docs" / "forms.md"

HEAD = """\
# Fused forms

How groups of equal operators are executed as one. Generated from the registry
(`runtime/forms/`) by `PYTHONPATH=tests python -m support.forms_table`; do not edit.

A group is written in the first form that takes it. What no form takes goes through `torch.vmap`,
traced once into plain ATen; what that cannot batch is a loop over the members, and
`cgo explain` says why. Forms marked "chosen" are for a GPU, and taken where they were measured to
be faster: kernels in Triton, and another memory format of images.

Layouts of a packed value of M members: *stacked* `(M, ...)`; *channels* `(N, M*C, ...)`, side by
side along axis 1; *either*: whichever its inputs have.

Each call in `tests/support/calls.py` is compared with plain torch, one member at a time: outputs
and gradients, over packed and over gathered inputs, with two and with three members. In each, NaN
and infinities in one member's inputs and weights must change no bit of the others', forward and
backward (`tests/runtime/test_forms.py`). Gradients of the smaller ones are compared with finite
differences, too.

## Forms

The name of a form is also its key in cost tables.
"""


def table(columns, rows):
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def name_of(op):
    return op.removeprefix("aten.")


def tested():
    """Calls by operator and form."""
    return Counter((operator(call.op), call.form) for call in CALLS)


def operator(op):
    return op.rpartition(".")[0] if op.startswith("aten.") else op


def document():
    counts = tested()
    forms = all_forms()
    of_form = [
        (
            f.name,
            _layouts(f),
            f.summary,
            sum(n for (_, form), n in counts.items() if form == f.name),
        )
        for f in forms
    ]
    operators = sorted({op for f in forms for op in f.operators}, key=name_of)
    of_operator = [(f"`{name_of(op)}`", *_row(op, forms_of(op), counts)) for op in operators]
    return (
        f"{HEAD}\n{table(('form', 'layouts', 'what it does', 'calls tested'), of_form)}\n\n"
        "## Operators\n\nForms in the order in which they are tried.\n\n"
        f"{table(('operator', 'forms', 'layouts', 'calls tested'), of_operator)}\n"
    )


def _layouts(form: Form) -> str:
    return f"{form.layouts}, chosen" if form.chosen else form.layouts


def _row(op, forms: list[Form], counts):
    names = [form.name for form in forms]
    layouts = dict.fromkeys(form.layouts for form in forms)
    tests = sum(counts[op, name] for name in [*names, "vmap"])
    return ", ".join(names), ", ".join(layouts), tests


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(document())
