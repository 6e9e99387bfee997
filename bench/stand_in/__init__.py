"""A GPU that is not there: Triton's real binder, its real compiler and its real launcher, over a
driver (`driver.c`) that does nothing.

    from bench import stand_in
    stand_in.activate()               # before anything imports the kernels

Kernels are then "launched" on CPU tensors, where the backend `triton` is forced, and compute
nothing. That times what the host does for a call, finds the compile and launch errors of every
kernel that is launched, and fills Triton's cache for a machine with a GPU and the same Triton.

    with stand_in.launches() as found:    # what the driver was given, whoever launched
        ...
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("driver.c")
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
    with contextlib.suppress(FileExistsError):  # the name that earlier versions of Triton link
        (library.parent / "libcuda.so").symlink_to(SONAME)
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
    # The tensors are on the CPU, also on a machine with a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
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


class Launch(NamedTuple):
    """A launch as the driver was given it.

    Attributes:
        kernel: its name.
        entry: the driver's function.
        grid, block: blocks and threads along each axis.
        shared: bytes of shared memory of a block.
        attributes: how many attributes the launch has.
        stream: the handle.
        has_context: whether the thread had a context.
        parameters: the bytes of each parameter, whose number and sizes the compiled file states.
    """

    kernel: str
    entry: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int
    stream: int
    has_context: bool
    parameters: tuple[bytes, ...]


class _Record(ctypes.Structure):
    """`struct launch` of driver.c."""

    _fields_ = (
        ("name", ctypes.c_char * 128),
        ("is_extended", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("has_context", ctypes.c_uint64),
        ("parameters", ctypes.c_int32),
        ("sizes", ctypes.c_uint16 * 128),
        ("bytes", ctypes.c_uint8 * 4096),
    )

    def launch(self) -> Launch:
        ends, data = [0], bytes(self.bytes)
        for size in self.sizes[: self.parameters]:
            ends.append(ends[-1] + size)
        return Launch(
            self.name.decode(),
            "cuLaunchKernelEx" if self.is_extended else "cuLaunchKernel",
            tuple(self.grid),
            tuple(self.block),
            self.shared,
            self.attributes,
            self.stream,
            bool(self.has_context),
            tuple(data[a:b] for a, b in itertools.pairwise(ends)),
        )


_MOST_LAUNCHES = 256  # as in driver.c


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Collects the launches that the driver is given inside the block. They are in the list behind
    it, at most 256 of them."""
    driver = ctypes.CDLL(str(_built()))
    records, count = (
        ctypes.c_int.in_dll(driver, f"stand_in_{name}") for name in ("records", "launched")
    )
    found: list[Launch] = []
    count.value, records.value = 0, 1
    try:
        yield found
    finally:
        records.value = 0
        kept = (_Record * _MOST_LAUNCHES).in_dll(driver, "stand_in_launches")
        found += [each.launch() for each in kept[: count.value]]


@contextmanager
def failing(error: int) -> Iterator[None]:
    """Has every launch inside the block return that error."""
    value = ctypes.c_int.in_dll(ctypes.CDLL(str(_built())), "stand_in_error")
    value.value = error
    try:
        yield
    finally:
        value.value = 0
