"""The Triton kernels and their launchers, one file per operation.

Importing this package imports triton.
"""

from .conv import convolution, convolution_backward
from .linear import linear, linear_backward
from .norm import slice_norms
from .weight import weight_norm, weight_norm_backward

__all__ = [
    "convolution",
    "convolution_backward",
    "linear",
    "linear_backward",
    "slice_norms",
    "weight_norm",
    "weight_norm_backward",
]
