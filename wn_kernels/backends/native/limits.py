"""The thresholds of the native library: the cost model computes with them, and the sources are
compiled with them.
"""

from __future__ import annotations

import torch

from ...call import NORM_RANGE

# A linear layer of several rows of `x`, but no more than these, reads `V` once if it has at least
# so many inputs and elements.
FEW_ROWS = 32
FEW_ROWS_INPUTS = 512
FEW_ROWS_ELEMENTS = 2**18
# Rows of `x` below which `V xᵀ` beats `x Vᵀ`.
LEFT_ROWS = 256
# Taps of a line of the kernel from which an unfolded input is copied along them.
LONG_LINE = 8
# Rows of `V` in a tile of a product with few columns.
TILE_ROWS = 4
# Bytes of a vector register.
VECTOR_BYTES = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32


def reads_once(rows: int, outputs: int, inputs: int) -> bool:
    """Whether the native library's products of few rows serve a linear layer."""
    return (
        1 < rows <= FEW_ROWS and inputs >= FEW_ROWS_INPUTS and outputs * inputs >= FEW_ROWS_ELEMENTS
    )


def panel(itemsize: int) -> int:
    """Columns of `V` in a panel of a product with few columns."""
    return 2 * VECTOR_BYTES // itemsize


def definitions() -> list[str]:
    """The compiler's flags that define all of these in the sources."""
    numbers: dict[str, float] = {
        name: value
        for name, value in globals().items()
        if name.isupper() and isinstance(value, int)
    }
    for dtype, suffix in ((torch.float32, "FLOAT"), (torch.float64, "DOUBLE")):
        least, most = NORM_RANGE[dtype]
        numbers |= {f"LEAST_{suffix}": least, f"MOST_{suffix}": most}
    return [f"-DWN_{name}={value!r}" for name, value in numbers.items()]
