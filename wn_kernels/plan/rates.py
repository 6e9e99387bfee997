"""The rates of the processor at hand, by which the cost model's constants are scaled.

The constants of `devices.py` and `costs.py` were found on one processor, whose rates are REFERENCE.
On another one, each is scaled by the ratio of the two processors' rates. `calibration.py` measures
them when the native library is built, or when a model is tuned for the first time. They are stored
beside the library, under the processor's name, and a process reads them once, so that its plans do
not change. Without them the constants serve as they are.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from .. import cache
from ..backends import vendor
from . import table

# This variable names the file. If it is empty, no rates are measured or used.
VARIABLE = "WN_KERNELS_RATES"
# These variables hold libraries to instruction sets, and so change their rates.
LIMITS = (*vendor.ONEDNN_VARIABLES, "MKL_ENABLE_INSTRUCTIONS")

_ENTRY = "rates"
_FILE = "the file of rates"


class Rates(NamedTuple):
    """What a thread of a processor does in a second, and the overhead of a call.

    Attributes:
        memory: bytes that a pass over tensors in memory moves.
        cache: bytes that a pass over tensors in the cache moves.
        product: operations of PyTorch's product of large matrices in float32.
        few: operations of PyTorch's product of a matrix with few columns.
        packed: operations of the native library's product of a matrix with many columns.
        convolution: operations of PyTorch's convolution, by oneDNN.
        bfloat16, float16: operations of PyTorch's product of a matrix with many columns in these
            dtypes, by oneDNN; those of `product` if oneDNN does not compute it.
        call: seconds of a call of the native library that does next to nothing.
    """

    memory: float
    cache: float
    product: float
    few: float
    packed: float
    convolution: float
    bfloat16: float
    float16: float
    call: float

    def __str__(self) -> str:
        return (
            f"{self.memory / 1e9:.0f} GB/s from memory, {self.cache / 1e9:.0f} from the cache; "
            f"products {self.product / 1e9:.0f} Gflop/s, with few columns {self.few / 1e9:.0f}, "
            f"the library's own {self.packed / 1e9:.0f}; convolutions {self.convolution / 1e9:.0f} "
            f"Gflop/s; products in bfloat16 {self.bfloat16 / 1e9:.0f}, in float16 "
            f"{self.float16 / 1e9:.0f}; a call {self.call * 1e6:.1f} µs"
        )

    def is_valid(self) -> bool:
        """Returns whether all are positive numbers."""
        return all(isinstance(x, float) and 0 < x < math.inf for x in self)


# Those of an AMD EPYC (Zen 4) with AVX-512, by torch 2.13. That of packed rows follows from the
# rate of few columns there, 77 Gflop/s, and from both on a Zen 5. That of the convolution follows
# from those of the constants that were fitted there (`costs.CONVOLUTION_EFFICIENCY`). Those of half
# precision were not measured there; the constants take them for those of float32.
REFERENCE = Rates(2.2e10, 6.4e10, 9.6e10, 7.55e10, 1.23e11, 1.0e11, 9.6e10, 9.6e10, 2.09e-6)


def location() -> Path | None:
    """Returns the file's path, or `None` if no rates are to be used."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    return cache.directory() / "rates.json"


def machine() -> str:
    """Returns the name of the processor, of the instruction sets in use, and torch's version."""
    held = (f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ)
    return "; ".join((table.processor(), f"torch {torch.__version__}", *held))


@functools.cache
def find() -> Rates | None:
    """Returns the rates that were stored for this machine, or `None`. A process reads them once."""
    path = location()
    entries = (path and table.read(path, _FILE)) or {}
    entry = entries.get(machine(), {}).get(_ENTRY, {})
    found = Rates(**entry) if entry.keys() == set(Rates._fields) else None
    return found if found and found.is_valid() else None


def store(rates: Rates) -> None:
    """Stores the rates of this machine.

    Raises:
        OSError: the file cannot be written, or other users may write to its folder.
    """
    path = location()
    if path is not None:
        table.write(path, machine(), {_ENTRY: rates._asdict()}, _FILE)
    find.cache_clear()
