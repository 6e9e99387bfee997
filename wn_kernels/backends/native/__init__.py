"""The native library is the fast path of a CPU. Its layers are nodes of the autograd graph, in C++.

    limits.h        thresholds that the cost model uses as well (limits.py)
    norm.h          the norms of a slice and their slopes
    vectors.h       vectors of float32 or float64, read from any dtype and written to any
    rows.h          passes over a weight whose slices are its rows
    columns.h       passes over a weight whose slices are not its rows
    call.h          which calls are served, and how
    weight.h        W, its norms and its gradients
    bend.h          the gradients of these gradients
    nodes.h         W and its gradients as nodes of the graph
    group.h         the weights of many layers in one call
    flat.h          the tensors of a recurrent layer on a GPU
    panels.h        matrices as the library's own products take them
    rows_product.h  V B, as tiles of a few columns or from packed rows of V
    products.h      the other products that read the weight once
    unfold.h        a convolution over few pixels as such a product
    linear.h, convolution.h
    cells.h         the units of recurrent cells
    recurrence.h    a recurrent layer over a sequence
    driver.h        launches by the CUDA driver
    passes.h        prepared launches of Triton's kernels, run without Python
    launched.h      the layers that consist of such passes
    prepared.h      how a layer takes the weight that its group has prepared
    kept.h          how it takes one that it keeps
    modules.h       what a fused layer takes from its module
    library.cpp     the Python bindings

The library is built once for a machine, by the compiler that `torch.compile` also uses there:

    python -m wn_kernels build

The first call that it may serve loads it. Without it, the ATen path serves every call.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ... import cache
from ...call import NORMS, Call
from .. import recurrence, reference, vendor
from . import limits

NAME = "wn_kernels_native"

# This variable adds flags for the compiler and the linker. Other flags give another file.
FLAGS_VARIABLE = "WN_KERNELS_CXXFLAGS"

SERVES = (
    "the native library needs non-empty CPU tensors with a batch dimension, in an eager call. g "
    "must have the dtype of v, and float64 tensors go with no others. Slices must be rows of "
    "memory; for convolutions columns also work, and for a weight alone any slices of a dense one. "
    "Norms must lie between 1e-10 and 1e10"
)


def serves_dim(dim: int | None, ndim: int) -> bool:
    """Returns whether a layer's slices along `dim` of its `ndim` dimensions are rows or, for a
    convolution, columns."""
    return dim == 0 or (dim == ndim - 1 and ndim > 2)


def serves(call: Call) -> bool:
    """Returns whether the library serves a layer's call, as far as its description decides."""
    return bool(call.x_shape) and serves_dim(call.dim, len(call.v_shape))


# The library numbers the variants. It calls a variant "late", whichever side is scaled, or "own" if
# its products are the library's own.
_VARIANTS = {"materialize": 0, "scaled": 1, "input": 1, "output": 1, "unfold": 2, "widen": 3}
_OWN = 4


def encoded(call: Call, plan: Any, is_own: bool) -> tuple:
    """Returns a plan in the form that the library reads (`Plan` in call.h). `is_own` states whether
    the products of a linear layer's variant `scaled` are the library's own."""
    sizes: tuple[int, ...] = ()
    adds_bias = False
    if call.conv is not None:
        adds_bias = vendor.adds_bias(call.x_shape, call.v_shape, call.x_dtype, call.conv)
        outputs = call.conv.output_sizes(call.x_shape[2:], call.v_shape[2:])
        sizes = (call.x_shape[0], call.conv.out_channels(call.v_shape), *outputs)
    variants = (
        _OWN if is_own and name == "scaled" else _VARIANTS[name]
        for name in (plan.recorded, plan.forward, plan.backward)
    )
    return call.conv, sizes, *variants, bool(plan.keeps), adds_bias


_HERE = Path(__file__).parent
SOURCES = sorted((*_HERE.glob("*.cpp"), *_HERE.glob("*.h")))

# The library uses the instructions that PyTorch itself uses on this machine, and no others, because
# machines may share a cache.
_INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}


def location() -> Path:
    """Returns the path of the library. Its name is a hash of the sources, the versions, the target
    and the compiler's flags."""
    target = (sys.platform, platform.machine(), sys.implementation.cache_tag)
    key = hashlib.sha256(repr((torch.__version__, *target, *_flags())).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    return cache.directory() / "native" / key.hexdigest()[:16] / f"{NAME}.so"


def _flags() -> list[str]:
    parallel = torch.backends.openmp.is_available()
    return [
        "-O3",
        "-fno-math-errno",  # so that roots are taken in vectors
        *(["-fopenmp", "-DAT_PARALLEL_OPENMP=1"] if parallel else []),
        *_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), []),
        *limits.definitions(),
        *_more_flags(),
    ]


def _more_flags() -> list[str]:
    return os.environ.get(FLAGS_VARIABLE, "").split()


def build() -> Path:
    """Builds the library unless it exists, and returns its path.

    Raises:
        RuntimeError: there is no C++ compiler or no ninja, the compiler fails, the file cannot be
            written, or another user may write to its folder. The message says which.
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
    forget()
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
    """Returns the library and an empty string, or `None` and the reason."""
    path = location()
    try:
        if not path.exists():
            return None, "it was not built (run python -m wn_kernels build)"
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


_connected: Any = None  # the library that has its callbacks


def library(*callbacks: Callable[..., tuple | None]) -> Any:
    """Returns the library, or `None` if it cannot be used. The callbacks `prepare.plan_native` and
    `operators.launches` plan its new calls."""
    global _connected
    found = _loaded()[0]
    if found is not _connected:
        if found is not None:
            derivatives = (
                reference.differentiable_grads,
                reference.weight_grads_backward,
                recurrence.grads,
            )
            found.set_callbacks(*callbacks, *derivatives, NORMS)
        _connected = found
    return found


def kernel(kernel: Any) -> Any:
    """Returns a function of `(stream, device, addresses)` that launches a `Kernel` of
    backends/triton/compiled.py by the driver, or `None` without the library or a driver."""
    found = _loaded()[0]
    return None if found is None else found.kernel(kernel)


def helpers() -> Any:
    """Returns the library for functions that serve tensors on any device, or `None`."""
    return _loaded()[0]


# Tables that Python keeps in the library's place.
memos: list[dict] = []


def forget() -> None:
    """Clears the library's tables of plans, and Python's."""
    for memo in memos:
        memo.clear()
    found = _loaded()[0]
    if found is not None:
        found.forget()


def compiler() -> str:
    """Returns the name of the compiler that built the library, which must be usable."""
    return _loaded()[0].compiler


def unavailable() -> str | None:
    """Returns why the library cannot be used in this process, or `None` if it can."""
    return _loaded()[1] or None
