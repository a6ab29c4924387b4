"""A trial that trains nothing: it tells each model's epochs, and crashes where a model says so.

It starts in a tenth of a second, so that many crashes can be tried. A model's `script` says how it
crashes ("" not at all), before which epoch, and in the company of how many models at least.
"""

import argparse
import json
import os
import signal
from pathlib import Path

from cgo.events import Event, encode


def scripted(script="", epoch=0, least=1):
    """The factory of such models; what it builds is never trained."""
    from torch import nn  # a trial does without

    return nn.Linear(6, 3)


def crash(how):
    if how == "abort":
        os.abort()
    elif how in ("segfault", "kill"):
        os.kill(os.getpid(), {"segfault": signal.SIGSEGV, "kill": signal.SIGKILL}[how])
    os._exit(int(how.partition(" ")[2]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("document", type=Path)
    parser.add_argument("--events-fd", type=int)
    parser.add_argument("--parent-fd", type=int)
    parser.add_argument("--commands-fd", type=int)
    options = parser.parse_args()
    document = json.loads(options.document.read_text())
    if os.environ.get("CGO_TEST_BROKEN"):
        os.abort()
    models = {entry["id"]: entry["factory"]["kwargs"] for entry in document["models"]}

    def tell(model, kind, epoch=None, value=None):
        os.write(options.events_fd, (encode(Event(model, kind, epoch, value)) + "\n").encode())

    for model, kwargs in models.items():
        if kwargs.get("epoch") == -1:  # while it is imported
            print(f"{model} crashes", flush=True)
            crash(kwargs["script"])
    tell("", "trial", None, {"what": "begun"})
    for model in models:
        tell(model, "started")
    for epoch in range(2):
        for model, kwargs in models.items():
            now = kwargs.get("script") and kwargs.get("epoch", 0) == epoch
            if now and len(models) >= kwargs.get("least", 1):
                print(f"{model} crashes", flush=True)
                crash(kwargs["script"])
            row = {"train_loss": 1.0, "val_loss": 1.0, "val_accuracy": 0.5, "lr": 0.1, "seconds": 0}
            tell(model, "epoch", epoch, row)
    ended = {"success": True, "error": None, "weights": "weights/none", "sha256": "0"}
    for model in models:
        tell(model, "final", None, 0.5)
        tell(model, "ended", None, ended)
    tell("", "trial", None, {"what": "finished"})


if __name__ == "__main__":
    main()
