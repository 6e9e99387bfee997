"""The thresholds of the native library."""

import torch

from wn_kernels.backends.native import limits


def left(most):
    return [rows for rows in range(most) if limits.is_left(rows)]


def test_products_with_the_weight_on_the_left():
    """Several threads take them for at most half a group of rows, for whole groups, and from 32
    rows on; one thread from 32 on."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert left(34) == [2, 3, 4, 8, 16, 24, 32, 33]
        torch.set_num_threads(1)
        assert left(34) == [32, 33]
        assert limits.is_left(255)
        assert not limits.is_left(256)
    finally:
        torch.set_num_threads(threads)
