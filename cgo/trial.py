"""A trial's entry point: `python -m cgo.trial GRAPH_JSON --events-fd N`.

Without a document, and inside a trial of NNI's, what to train is NNI's next parameter.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from cgo.allowed import ALLOWED_MODULES
from cgo.commands import Commands
from cgo.errors import TrialError
from cgo.events import Event, encode
from cgo.graph import ModelId
from cgo.graph_data import GraphData
from cgo.imports import search_first
from cgo.platforms.local import IMPORT_ROOTS, IN_TRIAL, follow_parent
from cgo.reading import is_vouched, read_document
from cgo.user_code import Terminated, terminate_on_signals

#: The document this process was started with; read by `experiment_config` and `execute`.
_current: GraphData | None = None


def execute(
    graph_data: GraphData | None = None,
    *,
    folder: Path | None = None,
    report: Callable[[Event], None] | None = None,
    observer: Any = None,
    limits: Any = None,
    vouched: bool = False,
    commands: Commands | None = None,
) -> dict[ModelId, float]:
    """Train a document's models in this process and return their final metrics.

    Args:
        graph_data: What to train; None takes the document that the trial was started with.
        folder: Where weights and the checkpoint go; default is a temporary folder.
        report: Called with each event.
        observer: See `cgo.runtime.device_lanes.Observer`.
        limits: On each operator, see `cgo.runtime.watching.Limits`; default is what the devices
            hold.
        vouched: See `cgo.runtime.admission.admit`.
        commands: Which models are to join or to end meanwhile.

    Raises:
        TrialError: no document was given and this process is no trial.
    """
    from cgo.runtime.training import train

    graph_data = graph_data if graph_data is not None else _current
    if graph_data is None:
        raise TrialError("this process is no trial; give the GraphData to execute")
    rest = {
        "observer": observer,
        "limits": limits,
        "vouched": vouched,
        "commands": commands,
    }
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="cgo-trial-") as temporary:
            return train(graph_data, Path(temporary), report or _ignore, **rest)
    return train(graph_data, folder, report or _ignore, **rest)


def _ignore(event: Event) -> None:
    """Nobody asked to hear of events."""


def experiment_config() -> Mapping[str, Any]:
    """The experiment's settings, as the engine put them into the trial's document.

    Raises:
        TrialError: this process is no trial.
    """
    if _current is None:
        raise TrialError("experiment_config is only there inside a trial")
    return _current.experiment


def enter(graph_data: GraphData) -> None:
    """Make this process the trial of a document."""
    global _current
    _current = graph_data


def leave() -> None:
    """Make this process no trial again."""
    global _current
    _current = None


def begin(refused: Mapping[ModelId, str], report: Callable[[Event], None]) -> None:
    """Tell that this process can be a trial, and which models cannot be part of it, and why."""
    report(Event("", "trial", None, {"what": "begun"}))
    for id_, error in refused.items():
        ended = {"success": False, "error": error, "weights": None, "sha256": None}
        report(Event(id_, "ended", None, ended))


def main(arguments: list[str] | None = None) -> int:
    """Run a trial; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cgo.trial", description=__doc__)
    parser.add_argument(
        "document", type=Path, nargs="?", help="the GraphData, a JSON file; none: NNI's parameter"
    )
    parser.add_argument("--events-fd", type=int, default=1, help="where event lines are written")
    parser.add_argument("--commands-fd", type=int, help="where lines of commands are read")
    parser.add_argument("--parent-fd", type=int, help="a pipe whose closing ends the trial")
    parser.add_argument(
        "--requests-fd", type=int, help="where trials are asked for, one after another: cgo.worker"
    )
    parser.add_argument(
        "--allowed-modules",
        help="modules, with commas between them, that may be imported for the document; without, "
        f"those of {ALLOWED_MODULES}, and where that is not set, all that the document names",
    )
    parser.add_argument(
        "--max-growth-bytes", type=int, help="by how much the process may grow between trials"
    )
    options = parser.parse_args(arguments)
    given = options.document is not None or options.requests_fd is not None
    if not given and "NNI_PLATFORM" not in os.environ:
        parser.error("a document is needed outside of NNI's trials")
    if options.allowed_modules is not None:
        os.environ[ALLOWED_MODULES] = options.allowed_modules
    faulthandler.enable(all_threads=False)  # the log then says which line of Python crashed
    terminate_on_signals()
    os.environ[IN_TRIAL] = "1"
    try:
        return _run(options)
    except Terminated as ended:
        return ended.code


def _run(options: argparse.Namespace) -> int:
    if options.parent_fd is not None:
        follow_parent(options.parent_fd)
    if options.requests_fd is not None:
        from cgo.worker import serve

        return serve(options.requests_fd, options.events_fd, options.max_growth_bytes)
    if options.document is None:
        from cgo.nni.trial import run

        return run()
    with os.fdopen(options.events_fd, "w", buffering=1, closefd=False) as events:
        fd = options.commands_fd
        commands = None if fd is None else Commands.following(fd)
        train_document(options.document, events, commands=commands)
    return 0


def train_document(
    path: Path,
    events: TextIO,
    *,
    vouched: str | None = None,
    commands: Commands | None = None,
) -> None:
    """Be the trial of a document; its modules are found in the folders of the environment.

    Args:
        path: The document; weights and the checkpoint go beside it.
        events: Where event lines are written.
        vouched: The SHA-256 of a document whose operators need not be tried before they are used.
        commands: Which models are to join or to end meanwhile.
    """
    search_first(os.environ.get(IMPORT_ROOTS, "").split(os.pathsep))
    content = path.read_bytes()
    document, refused = read_document(content, path.parent)
    enter(document)

    def report(event: Event) -> None:
        events.write(encode(event) + "\n")

    begin(refused, report)
    known = is_vouched(content, vouched)
    execute(folder=path.parent, report=report, vouched=known, commands=commands)


#: Seconds in which what user code has left running may end.
_LINGER_S = 10.0


def leave_soon(code: int) -> None:
    """End this process, whatever threads of user code do; its worker is wanted."""
    timer = threading.Timer(_LINGER_S, os._exit, (code,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    # Run as `__main__`, this module would otherwise exist twice, and user code that calls
    # `cgo.trial.experiment_config()` would see the copy that has no document.
    from cgo import trial

    code = trial.main()
    trial.leave_soon(code)
    sys.exit(code)
