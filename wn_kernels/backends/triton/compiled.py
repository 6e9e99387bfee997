"""Launches a compiled kernel without Triton's binder.

`kernel[grid](...)` binds, specialises and hashes every argument of every call, which takes 20 µs.
It returns a `CompiledKernel`, whose own launcher takes the arguments by position and needs 2 µs.

All that is used of Triton's internals stands here: what `JITFunction.run` returns, and how it calls
that launcher. `JITFunction.run` does so in the versions below. In any other version nothing is
launched from here, and the caller goes on with `kernel[grid](...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

VERSIONS = ("3.5", "3.6", "3.7", "3.8")

_triton_s_run = JITFunction.run
_is_supported = (
    ".".join(triton.__version__.split(".")[:2]) in VERSIONS
    and _triton_s_run.__module__ == "triton.runtime.jit"
)
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


def launcher(
    compiled: Any, grid: tuple[int, ...], device: int, constants: Sequence[Any]
) -> Callable[[Sequence[Any]], None] | None:
    """A function that launches the kernel on the current stream of the device, which has to be the
    current one. It takes the kernel's first arguments, addresses or tensor descriptors;
    `constants` are all the others in the kernel's order.

    `compiled` is what `kernel[grid](...)` returned. `None` where its launcher is not known.
    """
    if not _is_supported or not isinstance(compiled, CompiledKernel):
        return None
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    x, y, z = (*grid, 1, 1)[:3]
    current_stream = driver.active.get_current_stream
    if device < 0:  # tensors on no GPU, over a driver that takes them
        device = driver.active.get_current_device()
    # The launch's metadata and the hooks before and after it: nobody watches.
    unwatched = (None, None, None)

    def launch(arguments: Sequence[Any]) -> None:
        run(
            x,
            y,
            z,
            current_stream(device),
            function,
            metadata,
            *unwatched,
            *arguments,
            *constants,
        )

    return launch
