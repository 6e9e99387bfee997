"""A GPU that is not there: Triton's real binder, its real compiler and its real launcher, over a
driver (`stand_in.c`) that does nothing.

    from bench import stand_in
    stand_in.activate()               # before anything imports the kernels

Kernels are then "launched" on CPU tensors, where the backend `triton` is forced, and compute
nothing. That times what the host does for a call, finds the compile and launch errors of every
kernel that is launched, and fills Triton's cache for a machine with a GPU and the same Triton.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
SONAME = "libcuda.so.1"
KERNELS = "wn_kernels.backends.triton"


def _built() -> Path:
    """The driver's library, compiled once for each state of its source."""
    source = SOURCE.read_bytes()
    name = f"wn_kernels_stand_in_{os.getuid()}_{hashlib.sha256(source).hexdigest()[:16]}"
    library = Path(tempfile.gettempdir()) / name / SONAME
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            fresh = Path(scratch) / SONAME
            flags = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{SONAME}"]
            subprocess.run(["cc", *flags, "-o", str(fresh), str(SOURCE)], check=True)
            fresh.replace(library)  # at once, for processes that do the same
    return library


def activate(capability: tuple[int, int] = (9, 0)) -> None:
    """Makes the stand-in Triton's driver in this process, as a GPU of that compute capability.

    Raises:
        RuntimeError: the kernels were imported before, and may belong to Triton's interpreter.
        subprocess.CalledProcessError: the C compiler `cc` could not build the driver.
    """
    if KERNELS in sys.modules:
        raise RuntimeError(f"the stand-in has to be activated before {KERNELS} is imported")
    library = _built()
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    os.environ["TRITON_INTERPRET"] = "0"
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    class StandIn(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return capability

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    driver.set_active(StandIn())
