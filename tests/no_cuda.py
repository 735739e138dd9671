"""Let PyTorch's CPU build carry tensors that say they are on a GPU.

Autograd asks the device of each tensor for its streams. The CPU build has no CUDA to ask, so a
backward pass over the tensors of pretend.py fails there. `load` builds a CUDA that does nothing
(no_cuda.cpp) by g++. It must come before the first import of torch, which looks for devices once.
"""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def why_not() -> str:
    """Say why `load` cannot work here; "" if it can."""
    libraries = Path(importlib.util.find_spec("torch").origin).with_name("lib")
    if (libraries / "libtorch_cuda.so").exists():
        return "needs PyTorch's CPU build: this one has a CUDA of its own"
    return "" if shutil.which("g++") else "needs g++, to build a CUDA that does nothing"


def load() -> None:
    """Build and load it. Raises CalledProcessError where g++ fails."""
    assert "torch" not in sys.modules, "torch has looked for devices already"
    torch = Path(importlib.util.find_spec("torch").origin).parent
    source = Path(__file__).with_suffix(".cpp")
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}", str(source)]
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/no_cuda.so"
        subprocess.run([*command, "-o", built], check=True)
        for library in ("libc10.so", "libtorch_cpu.so"):  # whose symbols it takes
            ctypes.CDLL(str(torch / "lib" / library), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(built)
