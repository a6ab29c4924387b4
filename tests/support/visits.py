"""Models that write down in which process they were built, and may leave something behind there."""

import atexit
import ctypes
import gc
import importlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import torch
from torch import nn

#: What a module's globals keep is gone with the trial.
VISITS = []


def sets_global_seeds():
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


def sets_everything():
    """All that can be undone."""
    sets_global_seeds()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = True
    torch.backends.mkldnn.enabled = False
    torch.set_flush_denormal(True)
    os.environ["CGO_SURPRISE"] = "1"
    os.environ.pop("PATH")
    os.chdir("/")
    os.umask(0o077)
    sys.path.insert(0, "/nowhere")
    sys.setrecursionlimit(5000)
    sys.stdout = sys.stderr
    warnings.simplefilter("error")
    np.seterr(all="ignore")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])


def patches_a_function():
    torch.nn.functional.relu = torch.tanh


def patches_a_class():
    nn.Linear.forward = lambda self, x: nn.functional.linear(x, 2 * self.weight, self.bias)


def patches_defaults():
    torch.nn.functional.cross_entropy.__defaults__ = (
        *torch.nn.functional.cross_entropy.__defaults__[:-1],
        0.5,
    )


def hooks_all_modules():
    nn.modules.module.register_module_forward_hook(lambda module, given, found: found * 1.5)


def changes_precision():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def enters_a_mode():
    torch.set_default_device("meta")


def imports_a_library():
    importlib.import_module("patching_library")


def freezes_what_it_leaves():
    left = [VISITS]
    left.append(left)
    gc.freeze()


def leaves_a_thread():
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


def leaves_a_process():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def leaves_at_exit():
    atexit.register(sets_everything)


def leaks_memory():
    sys.leaked = bytearray(os.urandom(1) * 300_000_000)


def exits():
    os._exit(3)


def kills():
    os.kill(os.getpid(), signal.SIGKILL)


def segfaults():
    ctypes.string_at(0)


def prints():
    print("python says", VISITS)
    os.system("echo a shell says")


def visitor(path=None, does=None, hidden=5):
    """A small network; in a trial it first says where it is, and does something.

    Args:
        path: A file to which the process's number goes, and how often this module was visited.
        does: The name of a function of this module.
        hidden: Width.
    """
    if "CGO_IN_TRIAL" in os.environ:
        VISITS.append(does)
        if path is not None:
            with open(path, "a") as file:
                file.write(f"{os.getpid()} {len(VISITS)}\n")
        if does is not None:
            globals()[does]()
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 3))
