"""The `cgo` command."""

from __future__ import annotations

import sys

import typer

from cgo.cli.bench import bench
from cgo.cli.demo import demo
from cgo.cli.explain import explain
from cgo.cli.run import run
from cgo.errors import CgoError
from cgo.text import printable

app = typer.Typer(
    help="Train many small PyTorch models of a search as one merged graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(run)
app.command()(explain)
app.command()(bench)


def main() -> None:
    """Run the command line; what the user got wrong is one message, no traceback."""
    try:
        app()
    except CgoError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
