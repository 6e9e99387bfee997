"""Launches a compiled kernel without Triton's binder.

`kernel[grid](...)` binds, specialises and hashes every argument of every call, which takes 20 µs.
It returns a `CompiledKernel`, whose own launcher takes the arguments by position and needs 2 µs.

All that is used of Triton's internals stands here: what `JITFunction.run` returns, and how it calls
that launcher. `JITFunction.run` does so in the versions below. In any other version nothing is
launched from here, and the caller goes on with `kernel[grid](...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

VERSIONS = ("3.5", "3.6", "3.7", "3.8")

_triton_s_run = JITFunction.run
_VERSION = ".".join(triton.__version__.split(".")[:2])
_is_supported = _VERSION in VERSIONS and _triton_s_run.__module__ == "triton.runtime.jit"
_runtime = triton.knobs.runtime


def is_watched() -> bool:
    """Whether something observes launches that it could not see from here: a profiler has set a
    launch hook, or a launch checker has replaced `JITFunction.run`."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return (
        JITFunction.run is not _triton_s_run
        # A chain of hooks, or a function.
        or bool(enter and getattr(enter, "calls", True))
        or bool(leave and getattr(leave, "calls", True))
    )


class Compiled:
    """A compiled kernel with everything but its tensors. A call launches it on the current stream
    of its device, which has to be the current one; it takes the addresses of the
    kernel's tensors, which are its first arguments.

    Attributes:
        function: Triton's launcher. It takes the grid, the stream, the `fixed` arguments, and the
            kernel's, all in one tuple where `is_nested`.
        constants: the kernel's arguments after the tensors.
    """

    __slots__ = ("constants", "current_stream", "device", "fixed", "function", "grid", "is_nested")

    def __init__(
        self, compiled: CompiledKernel, grid: tuple[int, ...], device: int, constants: Sequence[Any]
    ) -> None:
        run = compiled.run
        self.grid = (*grid, 1, 1)[:3]
        self.constants = tuple(constants)
        self.device, self.current_stream = device, driver.active.get_current_stream
        if device < 0:  # tensors on no GPU, over a driver that takes them
            self.device = driver.active.get_current_device()
        # Nobody watches: no metadata of the launch, and no hook before and after it.
        unwatched = (None, None, None)
        self.is_nested = _is_plain(run)
        if self.is_nested:
            kind = run.launch_cooperative_grid, run.launch_pdl
            scratch = (None, None)
            signature = run.arg_annotations, run.kernel_signature
            self.function = run.launch
            self.fixed: tuple[Any, ...] = (
                compiled.function,
                *kind,
                compiled.packed_metadata,
                *unwatched,
                *scratch,
                *signature,
            )
        else:
            self.function = run
            self.fixed = compiled.function, compiled.packed_metadata, *unwatched

    def __call__(self, arguments: Sequence[Any]) -> None:
        stream = self.current_stream(self.device)
        if self.is_nested:
            self.function(*self.grid, stream, *self.fixed, (*arguments, *self.constants))
        else:
            self.function(*self.grid, stream, *self.fixed, *arguments, *self.constants)


def _is_plain(run: Any) -> bool:
    """Whether `run`, a kernel's launcher, is the one of an NVIDIA GPU in version 3.7, and would do
    nothing but to call its C function: the kernel needs no scratch memory."""
    if _VERSION != "3.7" or f"{type(run).__module__}.{type(run).__name__}" != _LAUNCHER:
        return False
    return not (run.global_scratch_size or run.profile_scratch_size)


_LAUNCHER = "triton.backends.nvidia.driver.CudaLauncher"


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
