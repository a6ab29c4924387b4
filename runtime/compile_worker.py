"""A process that compiles parts of steps and keeps them, beside the trial that asked for it.

It reads JSON lines: first where it is to keep what it compiles, then structures. It answers each
with a line, and ends when its input does: with the trial, whatever ended that.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import torch

from cgo.private import inductor
from cgo.runtime.accelerator import is_out_of_memory
from cgo.runtime.artifacts import Artifacts
from cgo.runtime.structure import Structure, examples_of, module_of

#: On a CPU Inductor would give channels last to all convolutions, and lowering keeps them off some.
AS_LOWERED: dict[str, Any] = {"layout_optimization": False}


def compile_structure(structure: Structure, artifacts: Artifacts, key: str) -> None:
    """Compile a structure, try it, and keep it; raises whatever Inductor's many parts raise."""
    examples = examples_of(structure)
    on_cpu = all(value.device.type == "cpu" for value in examples)
    with artifacts.torchs_own(), torch.no_grad():
        found = inductor.compiled(module_of(structure), examples, AS_LOWERED if on_cpu else None)
        found(*examples)
        artifacts.save(key, found)


def serve(lines: Iterable[str], answers: TextIO) -> None:
    """Answer all requests."""
    asked = iter(lines)
    setting = json.loads(next(asked))
    torch.set_num_threads(setting["threads"])
    if hasattr(os, "nice"):
        os.nice(setting["nice"])
    artifacts = Artifacts(Path(setting["folder"]))
    artifacts.prune()
    for line in asked:
        request = json.loads(line)
        started = time.perf_counter()
        answer: dict[str, Any] = {"key": request["key"]}
        try:
            compile_structure(Structure(request["document"]), artifacts, request["key"])
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            answer["lasting"] = not is_out_of_memory(error)  # beside training
        answer["seconds"] = time.perf_counter() - started
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serve standard input, whose end ends the process while it compiles, too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            waiting.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    serve(iter(waiting.get, None), answers)


if __name__ == "__main__":
    main()
