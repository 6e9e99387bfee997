"""The thresholds of the native library are stated here. The cost model computes with them, and the
sources are compiled with them.
"""

from __future__ import annotations

import torch

from ...call import NORM_RANGE

# A linear layer reads `V` once if `x` has 2 to FEW_ROWS rows, and `V` has at least FEW_ROWS_INPUTS
# columns and FEW_ROWS_ELEMENTS elements.
FEW_ROWS = 32
FEW_ROWS_INPUTS = 512
FEW_ROWS_ELEMENTS = 2**18
# `V xᵀ` is faster than `x Vᵀ` if `x` has fewer rows than this.
LEFT_ROWS = 256
# An unfolded input is copied along a line of the kernel if the line has at least this many taps.
LONG_LINE = 8
# A tile of a product with few columns takes this many rows of `V`.
TILE_ROWS = 4
# A vector register has this many bytes.
VECTOR_BYTES = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32


def reads_once(rows: int, outputs: int, inputs: int) -> bool:
    """Returns whether the native library's products of few rows serve a linear layer."""
    return (
        1 < rows <= FEW_ROWS and inputs >= FEW_ROWS_INPUTS and outputs * inputs >= FEW_ROWS_ELEMENTS
    )


def panel(itemsize: int) -> int:
    """Returns how many columns of `V` a panel of a product with few columns takes."""
    return 2 * VECTOR_BYTES // itemsize


def definitions() -> list[str]:
    """Returns the compiler's flags that define these constants in the sources."""
    numbers: dict[str, float] = {
        name: value
        for name, value in globals().items()
        if name.isupper() and isinstance(value, int)
    }
    for dtype, suffix in ((torch.float32, "FLOAT"), (torch.float64, "DOUBLE")):
        least, most = NORM_RANGE[dtype]
        numbers |= {f"LEAST_{suffix}": least, f"MOST_{suffix}": most}
    return [f"-DWN_{name}={value!r}" for name, value in numbers.items()]
