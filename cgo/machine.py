"""What this machine has to train on, found out without initialising CUDA in this process."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

_PROBE = """
import json, torch
found = []
for index in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(index)
    found.append([f"cuda:{index}", torch.cuda.get_device_name(index), total, free])
print(json.dumps(found))
"""

#: Without -P (new in Python 3.11), Python puts the current directory on the module path.
_UNSAFE_PATH = (
    "import runpy, sys; sys.path[:] = [p for p in sys.path if p]; "
    "runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)


def python_command(module: str) -> list[str]:
    """What runs a module in a process of its own, which finds nothing in the current directory."""
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", module]
    return [sys.executable, "-c", _UNSAFE_PATH.format(module=module)]


def cores() -> int:
    """Processor cores that this process may use: of the machine's, where it is held to some."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


@dataclass(frozen=True)
class Device:
    """One device and its memory."""

    device: str  # "cpu", "cuda:0"
    name: str
    total_memory_bytes: int
    free_memory_bytes: int


def devices() -> list[Device]:
    """The CUDA devices, or the CPU where there is none."""
    return _nvml_devices() or [Device(*row) for row in _probed_devices()] or [_cpu()]


def _cpu() -> Device:
    memory = psutil.virtual_memory()
    return Device("cpu", _cpu_name(), memory.total, memory.available)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _nvml_devices() -> list[Device]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # the package, the library or the driver is not there
        log.debug("NVML cannot be used: %s", error)
        return []
    try:
        return [_nvml_device(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _nvml_device(pynvml: object, index: int) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)  # type: ignore[attr-defined]
    name = pynvml.nvmlDeviceGetName(handle)  # type: ignore[attr-defined]
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)  # type: ignore[attr-defined]
    text = name.decode() if isinstance(name, bytes) else str(name)
    return Device(f"cuda:{index}", text, int(memory.total), int(memory.free))


@cache
def _probed_devices() -> tuple[tuple[str, str, int, int], ...]:
    """Ask a short-lived process, once; only where a driver is there at all."""
    if not Path("/proc/driver/nvidia").exists():
        return ()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120, check=True
        )
        return tuple(tuple(row) for row in json.loads(done.stdout))
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        log.warning("a CUDA driver is there, but its devices cannot be listed: %s", error)
        return ()
