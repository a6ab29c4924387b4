"""The `cgo` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; what the user got wrong is one message, no traceback."""
    # Here, as the modules beside this one are imported by processes that have no command line.
    from cgo.cli.commands import app
    from cgo.errors import CgoError
    from cgo.text import printable

    try:
        app()
    except CgoError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
