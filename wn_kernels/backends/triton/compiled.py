"""Launches a compiled kernel without Triton's binder.

`kernel[grid](...)` binds, specialises and hashes every argument of every call, which takes 20 µs.
It returns a `CompiledKernel`, whose own launcher takes the arguments by position and needs 2 µs.
The native library needs no launcher: it calls the driver with what `Kernel` holds.

All that is used of Triton's internals stands here: what `JITFunction.run` returns, how it calls
that launcher, and what that launcher does on an NVIDIA GPU. They are so in the versions below. In
any other version nothing is launched from here, and the caller goes on with `kernel[grid](...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .. import native

VERSIONS = ("3.5", "3.6", "3.7", "3.8")

_triton_s_run = JITFunction.run
_VERSION = ".".join(triton.__version__.split(".")[:2])
_is_supported = _VERSION in VERSIONS and _triton_s_run.__module__ == "triton.runtime.jit"
_runtime = triton.knobs.runtime

# Who observes launches that could not be seen from here changes one of these attributes: a launch
# checker replaces `JITFunction.run`, a profiler sets a hook or adds to a chain of them. Otherwise
# each has its usual value or is `None`, and a list is empty.
Sign = tuple[Any, str, Any]  # an object, the attribute's name and its usual value
SIGNS: list[Sign] = [(JITFunction, "run", _triton_s_run)]
_chains: list[Any] = []
for _name in ("launch_enter_hook", "launch_exit_hook"):
    _chains.append(getattr(type(_runtime), _name, None))
    SIGNS.append((_runtime, _name, _chains[-1]))
    if hasattr(_chains[-1], "calls"):
        SIGNS.append((_chains[-1], "calls", _chains[-1].calls))
_enter, _exit = _chains


def is_watched() -> bool:
    """Whether something observes launches that it could not see from here."""
    try:  # as `_is_unusual`, in less time
        if (
            JITFunction.run is _triton_s_run
            and _runtime.launch_enter_hook is _enter
            and _runtime.launch_exit_hook is _exit
            and not _enter.calls
            and not _exit.calls
        ):
            return False
    except AttributeError:  # a hook is no chain
        pass
    return _is_unusual()


def _is_unusual() -> bool:
    for owner, name, usual in SIGNS:
        value = getattr(owner, name)
        if (value is not usual and value is not None) or (value.__class__ is list and value):
            return True
    return False


class Kernel(NamedTuple):
    """What the CUDA driver is given of a launch, beside the stream and the addresses of tensors.

    Attributes:
        name: for messages.
        function: the kernel's handle.
        grid: blocks along each axis.
        threads: of a block.
        shared: bytes of shared memory of a block.
        scalars: the kernel's parameters after the tensors, as numbers of 64 bits.
    """

    name: str
    function: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    scalars: tuple[int, ...]


class Compiled:
    """A compiled kernel with everything but its tensors.

    Attributes:
        launch: launches it on the current stream of its device, which has to be the current one. It
            takes the addresses of the kernel's tensors, which are its first arguments, one by one.
        function: Triton's launcher. It takes the grid, the stream, the `fixed` arguments, and the
            kernel's, all in one tuple where `is_nested`.
        constants: the kernel's arguments after the tensors.
        kernel: what the driver can launch without Triton, or `None`.
    """

    __slots__ = (
        *("constants", "current_stream", "device", "fixed", "function", "grid"),
        *("is_nested", "kernel", "launch"),
    )

    def __init__(
        self, compiled: CompiledKernel, grid: tuple[int, ...], device: int, constants: Sequence[Any]
    ) -> None:
        run = compiled.run
        self.grid: Any = (*grid, 1, 1)[:3]
        self.constants = tuple(constants)
        self.device, self.current_stream = device, driver.active.get_current_stream
        if device < 0:  # tensors on no GPU, over a driver that takes them
            self.device = driver.active.get_current_device()
        # Nobody watches: no metadata of the launch, and no hook before and after it.
        metadata, unwatched = compiled.packed_metadata, (None, None, None)
        self.is_nested = False
        self.kernel = None
        self.function = run
        self.fixed: tuple[Any, ...] = compiled.function, metadata, *unwatched
        if _is_plain(run):
            self.is_nested = _VERSION in ("3.7", "3.8")
            self.kernel = _kernel(compiled, self.grid, self.constants)
            self.function = run.launch
            kind = run.launch_cooperative_grid, run.launch_pdl
            scratch = (None, None)
            if self.is_nested:
                signature = run.arg_annotations, run.kernel_signature
                last = *unwatched, *scratch, *signature
                self.fixed = compiled.function, *kind, metadata, *last
            else:
                self.fixed = compiled.function, *kind, *scratch, metadata, *unwatched
        self.launch = self._launch(len(compiled.src.signature) - len(self.constants))

    def _launch(self, tensors: int) -> Callable[..., None]:
        """Returns `launch`: the native library's where there is one, and else Triton's launcher
        with all that is fixed. Its arguments are written out, which takes less time than to join
        them in every call."""
        stream_of, device = self.current_stream, self.device
        if self.kernel is not None and (direct := native.kernel(self.kernel)) is not None:
            return lambda *addresses: direct(stream_of(device), device, addresses)
        addresses = ", ".join(f"a{i}" for i in range(tensors))
        fixed = {f"f{i}": value for i, value in enumerate(self.fixed)}
        constants = {f"c{i}": value for i, value in enumerate(self.constants)}
        scope = {"function": self.function, "stream_of": stream_of, "device": device}
        scope |= fixed | constants
        kernel_s = f"{addresses}, {', '.join(constants)}"
        given = *map(str, self.grid), "stream_of(device)", *fixed
        given = *given, f"({kernel_s},)" if self.is_nested else kernel_s
        exec(f"def launch({addresses}): function({', '.join(given)})", scope)
        return scope["launch"]


def _is_plain(run: Any) -> bool:
    """Whether `run`, a kernel's launcher, is the one of an NVIDIA GPU, and would do nothing but to
    call its C function: the kernel needs no scratch memory and is not instrumented."""
    if f"{type(run).__module__}.{type(run).__name__}" != _LAUNCHER:
        return False
    more = run.global_scratch_size, run.profile_scratch_size, getattr(run, "gsan_enabled", False)
    return not any(more)


_LAUNCHER = "triton.backends.nvidia.driver.CudaLauncher"

# The parameters that have a number's value in its first bytes, and none that takes more.
_NUMBERS = frozenset(("i32", "i64"))
_MOST_SHARED = 227 * 1024  # bytes of a block, beyond which a launch needs an attribute
_MOST_PARAMETERS = 64  # as in driver.h


def _kernel(
    compiled: CompiledKernel, grid: tuple[int, ...], constants: Sequence[Any]
) -> Kernel | None:
    """What the driver is given of a kernel whose launcher is plain: one block for each place of the
    grid, with no attribute of the launch. Its parameters are the arguments that are no constants,
    tuples flattened, and the addresses of no scratch memory."""
    run = compiled.run
    warps, blocks, shared = compiled.packed_metadata[:3]
    if run.launch_cooperative_grid or run.launch_pdl or blocks != 1 or shared > _MOST_SHARED:
        return None
    types = [*compiled.src.signature.values()]
    tensors = len(types) - len(constants)
    if not all(isinstance(kind, str) and kind[0] == "*" for kind in types[:tensors]):
        return None
    given = [
        (kind, value)
        for kind, value in _flattened(types[tensors:], constants)
        if kind != "constexpr"
    ]
    if len(given) + tensors + 2 > _MOST_PARAMETERS:
        return None
    if not all(kind in _NUMBERS and type(value) is int for kind, value in given):
        return None
    scalars = *(value % 2**64 for _, value in given), 0, 0
    threads = warps * compiled.metadata.target.warp_size
    return Kernel(compiled.name, compiled.function, grid, threads, shared, scalars)


def _flattened(types: Sequence[Any], values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flattened(kind, value)
        else:
            yield kind, value


def launcher(
    compiled: Any, grid: tuple[int, ...], device: int, constants: Sequence[Any]
) -> Compiled | None:
    """What launches the kernel on a device; `constants` are all of its arguments after the tensors,
    in the kernel's order.

    `compiled` is what `kernel[grid](...)` returned. `None` where its launcher is not known.
    """
    if not _is_supported or not isinstance(compiled, CompiledKernel):
        return None
    return Compiled(compiled, grid, device, constants)
