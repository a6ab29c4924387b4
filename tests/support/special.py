"""What is no plain file, under a name where one is looked for."""

import os
import socket


def special(kind, path):
    """Make a pipe, folder, device or socket; nothing for "missing"."""
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
    return path
