"""This file measures the rates of the processor (`plan/rates.py`), in a little more than a second.

One thread runs, and only the time that it has run counts, so that other processes hardly change a
rate. Each is the best of many short runs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import functional as WF
from . import prepare
from .backends import native, vendor
from .plan import Plan, rates
from .plan.rates import Rates

# How long each rate is measured, in seconds.
SECONDS = 0.15
# Tensors of these numbers of float32 elements are in memory and in the cache.
IN_MEMORY, IN_CACHE = 2**23, 2**16
# The sizes of a square product, and of those with a weight of OUTPUTS × INPUTS and few or many
# columns. The latter is the library's own.
SQUARE = 768
OUTPUTS, INPUTS, FEW, MANY = 512, 1024, 16, 128
# The channels, taps and pixels of a convolution.
CHANNELS, TAPS, PIXELS = 256, 3, 256


def _seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Returns the least time of a run, of which so many are timed together."""
    run()
    best, start = float("inf"), time.thread_time()
    while time.thread_time() - start < SECONDS:
        begin = time.thread_time()
        for _ in range(repeats):
            run()
        best = min(best, (time.thread_time() - begin) / repeats)
    return best


# These are on the CPU in float32, whatever torch's default device and dtype are.
_ones = functools.partial(torch.ones, device="cpu", dtype=torch.float32)


def _bandwidth(numbers: int) -> float:
    x = _ones(numbers)
    y = torch.empty_like(x)
    return 8 * numbers / _seconds(lambda: torch.mul(x, 2.0, out=y), max(1, IN_CACHE // numbers * 4))


def measure() -> Rates:
    """Measures one thread of this processor. The native library must be usable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured()
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _measured() -> Rates:
    square = _ones(SQUARE, SQUARE)
    v, x, g = _ones(OUTPUTS, INPUTS), _ones(MANY, INPUTS), _ones(OUTPUTS, 1)
    out, few = torch.empty_like(square), _ones(OUTPUTS, FEW)
    image, kernel = _ones(1, CHANNELS, PIXELS), _ones(CHANNELS, CHANNELS, TAPS)
    tiny, ones = _ones(2, 2), _ones(2, 1)
    with prepare.watching() as calls:
        WF.wn_linear(x, v, g)
    with prepare.fixed(calls[0][0], Plan("native", "scaled", "scaled")):
        packed = _seconds(lambda: WF.wn_linear(x, v, g))
    flops = 2.0 * OUTPUTS * INPUTS
    product = 2.0 * SQUARE**3 / _seconds(lambda: torch.mm(square, square, out=out))

    def half(dtype: torch.dtype) -> float:
        if dtype in vendor.SLOW:
            return product
        a, b = v.to(dtype), x.to(dtype).t()
        return MANY * flops / _seconds(lambda: torch.mm(a, b))

    convolution = 2.0 * kernel.numel() * PIXELS
    return Rates(
        memory=_bandwidth(IN_MEMORY),
        cache=_bandwidth(IN_CACHE),
        product=product,
        few=FEW * flops / _seconds(lambda: torch.mm(v, x[:FEW].t(), out=few)),
        packed=MANY * flops / packed,
        convolution=convolution / _seconds(lambda: F.conv1d(image, kernel, padding=TAPS // 2)),
        bfloat16=half(torch.bfloat16),
        float16=half(torch.float16),
        call=_seconds(lambda: WF.weight_norm(tiny, ones), 20),
    )


def ensure() -> Rates | None:
    """Returns the rates of this machine. If there are none yet, it measures and stores them. It
    returns `None` if they are not to be used, or if there is no native library.

    Raises:
        OSError: they cannot be stored.
    """
    if rates.location() is None or native.unavailable() is not None:
        return None
    if (found := rates.find()) is None:
        rates.store(measure())
        prepare.forget()
        found = rates.find()
    return found
