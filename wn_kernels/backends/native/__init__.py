"""The fast path of a CPU in C++: the layers as nodes of the autograd graph.

    rows.h          passes over the rows of a weight, each read once
    columns.h       and over one whose slices are something else
    call.h          which calls are served, and how
    weight.h        W, its norms and its gradients
    panels.h        products of a weight with few columns, from one read of it
    unfold.h        and a convolution over few pixels as one of them
    linear.h, convolution.h
    library.cpp     what Python sees

It is built once for a machine, by the compiler that `torch.compile` uses there, too:

    python -m wn_kernels build

and loaded by the first call that it may serve. Without it, the ATen path serves every call.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from ... import cache

NAME = "wn_kernels_native"

# More flags for the compiler and the linker; a library that is built with others is another file.
FLAGS_VARIABLE = "WN_KERNELS_CXXFLAGS"

# What it knows.
DTYPES = frozenset((torch.float32, torch.float64))
SERVES = (
    "the native library knows batches of float32 or float64 tensors on a CPU, all of one dtype and "
    "none empty, norms from 1e-10 to 1e10 of slices that are rows in memory (a convolution's: or "
    "columns; a weight's alone: of any dense one), in plain eager calls without autocast"
)


def knows(dim: int | None, ndim: int) -> bool:
    """Whether a layer's slices along `dim` of its `ndim` dimensions are rows or, a convolution's,
    columns."""
    return dim == 0 or (dim == ndim - 1 and ndim > 2)


_HERE = Path(__file__).parent
SOURCES = sorted((*_HERE.glob("*.cpp"), *_HERE.glob("*.h")))

# The instructions that PyTorch itself uses on this machine, and no others: a cache may be shared.
_INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}


def location() -> Path:
    """The library's file, named after everything that it is built from and for."""
    target = (sys.platform, platform.machine(), sys.implementation.cache_tag)
    key = hashlib.sha256(repr((torch.__version__, *target, *_flags())).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    return cache.directory() / "native" / key.hexdigest()[:16] / f"{NAME}.so"


def _flags() -> list[str]:
    parallel = torch.backends.openmp.is_available()
    return [
        "-O3",
        *(["-fopenmp", "-DAT_PARALLEL_OPENMP=1"] if parallel else []),
        *_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), []),
        *_more_flags(),
    ]


def _more_flags() -> list[str]:
    return os.environ.get(FLAGS_VARIABLE, "").split()


def build() -> Path:
    """Builds the library, unless it is there; returns its file.

    Raises:
        RuntimeError: there is no C++ compiler or no ninja, or the compiler fails, or the file
            cannot be written, or somebody else may write where it belongs; the message says which.
    """
    path = location()
    try:
        if not path.exists():
            with cache.replacing(path, cache.root()) as new:
                if not path.exists():  # another process may have built it in the meantime
                    _compile(new.parent)
        if reason := cache.distrust(path, cache.root()):
            raise PermissionError(reason)
    except OSError as error:
        raise RuntimeError(f"the native library cannot be built as {path}: {error}") from error
    _loaded.cache_clear()
    return path


def _compile(folder: Path) -> None:
    """Builds the library in an empty folder."""
    from torch.utils import cpp_extension

    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), before))  # ninja's
    try:
        cpp_extension.load(
            NAME,
            [str(source) for source in SOURCES if source.suffix == ".cpp"],
            extra_cflags=_flags(),
            extra_ldflags=_more_flags(),
            build_directory=str(folder),
            is_python_module=False,
        )
    finally:
        os.environ["PATH"] = before


@functools.cache
def _loaded() -> tuple[Any, str]:
    """The library, or `None` and the reason."""
    path = location()
    try:
        if not path.exists():
            return None, "it was not built (python -m wn_kernels build does)"
        if reason := cache.distrust(path, cache.root()):
            return None, f"{path} is not loaded: {reason}"
        loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
        spec = importlib.util.spec_from_file_location(NAME, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, OSError) as error:  # a broken file must not break the ATen path
        return None, f"loading {path} failed: {error}"
    return module, ""


def library() -> Any:
    """The library, or `None` where it cannot be used."""
    return _loaded()[0]


def unavailable() -> str | None:
    """Why the library cannot be used in this process, or `None` if it can."""
    return _loaded()[1] or None
