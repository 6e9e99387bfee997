"""What a call holds: between forward and backward, and at most at any moment."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.measure.timing import session_of

# The file malloc.h of glibc defines the numbers of these two options. Their values are in bytes.
# The first takes no larger value. The second is more than the heap ever has free.
_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD = -3, 32 << 20
_M_TRIM_THRESHOLD, _NEVER = -1, 1 << 30


def settle_heap() -> None:
    """Has the C library keep freed memory of this process, where that is glibc.

    By default glibc gives the top of its heap back to the system, or does not, by what was freed
    before. A call of a megabyte then takes up to 1.4 times as long as the same call a moment later,
    since each of its pages is mapped anew.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def saved_bytes(leaves: list[Tensor], forward: Callable[[], Tensor]) -> int:
    """Memory kept between forward and backward, beyond the input and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in leaves}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    del y
    return sum(saved.values())


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most that a run has allocated at once, over what there was before it."""
    with session_of(run)():
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
