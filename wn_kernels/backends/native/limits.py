"""The thresholds of the native library are stated here. The cost model and the ATen path compute
with them, and the sources are compiled with them.
"""

from __future__ import annotations

import math

import torch

from ...call import NORM_RANGE, Call

# The cost model compares the library's own products of a linear layer with PyTorch's, for an `x` of
# at most so many rows and bytes in the dtype of the products.
OWN_ROWS = 4096
OWN_BYTES = 2**24
# In half precision, `V` must also have at least so many columns and elements. The products are
# computed in float32, and read `V` once.
HALF_INPUTS = 512
HALF_ELEMENTS = 2**18
# `V xᵀ` is faster than `x Vᵀ` if `x` has at least LEFT_ROWS_ALONE rows, and fewer than LEFT_ROWS.
# Several threads take it for fewer as well, if they are whole groups of LEFT_GROUP, or at most half
# of one. A rest takes MKL longer than the group.
LEFT_ROWS = 256
LEFT_ROWS_ALONE = 32
LEFT_GROUP = 8
# An unfolded input is copied along a line of the kernel if the line has at least this many taps.
LONG_LINE = 16
# A part of the columns of a product has at least so many.
PART_COLUMNS = 32
# One call computes both gradients of a convolution if `W` has at most this many bytes. A larger `W`
# is freed before `dW` is allocated.
AT_ONCE_BYTES = 2**22
# A vector register has this many bytes.
VECTOR_BYTES = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
# A tile of a product takes this many rows of `V`. Its sums and its operands fit in the registers.
TILE_ROWS = 8 if VECTOR_BYTES == 64 else 6


def may_be_own(call: Call) -> bool:
    """Returns whether the products of a linear layer may be the library's own."""
    outputs, inputs = call.v_shape
    rows = math.prod(call.x_shape[:-1])
    if rows == 1:
        return True
    size = call.x_dtype.itemsize
    if size == 2 and (inputs < HALF_INPUTS or outputs * inputs < HALF_ELEMENTS):
        return False
    return rows <= OWN_ROWS and rows * inputs * max(4, size) <= OWN_BYTES


def is_left(rows: int) -> bool:
    """Returns whether PyTorch's product with this many rows has `V` on its left."""
    if rows >= LEFT_ROWS_ALONE:
        return rows < LEFT_ROWS
    fits = rows <= LEFT_GROUP // 2 or rows % LEFT_GROUP == 0
    return rows > 1 and fits and torch.get_num_threads() > 1


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
