"""A trial that mixes events with lines that are none."""

import os
import sys

from cgo.events import Event, encode

fd = int(sys.argv[sys.argv.index("--events-fd") + 1])
lines = [
    encode(Event("a", "started", None, None)),
    "this is no event",
    '{"model": "x", "kind": "invented", "epoch": null, "value": null}',
    encode(Event("b", "started", None, None)),
    encode(Event("", "trial", None, {"what": "finished"})),
]
os.write(fd, ("\n".join(lines) + "\n").encode())
