"""Kernels compiled for an H100, which takes no device.

It takes a process of its own: kernels are compiled or interpreted from when they are defined.
"""

import os
import subprocess
import sys
from pathlib import Path


def compile_kernel(kernel, types, constants, attributes=None, **options):
    """Compile a kernel as a launch would; call it in a process that does not interpret.

    Args:
        kernel: By `triton.jit`.
        types: Of its arguments by name, as Triton spells them.
        constants: Of the others.
        attributes: What is known of arguments, by position.
        options: Of the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    given = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, given, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def run_compiling(script, folder):
    """Run lines of Python that compile kernels; what they print."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
