"""This package initialises weight-normalised networks.

    from wn_kernels import init

    report = init.data_dependent_(model, batch)    # pre-activations of mean 0 and variance 1
    init.norm_preserving_(model, {"*.conv2": 1 / 3, "*.shortcut": 1})    # without data

Both take any model that `wn_kernels.fuse` accepts: layers of this package, layers that `fuse`
converted, and both forms of PyTorch's weight norm. docs/training.md compares them.
"""

from .data_dependent import Initialised, Report, data_dependent_
from .moments import Moments
from .norm_preserving import norm_preserving_

__all__ = ["Initialised", "Moments", "Report", "data_dependent_", "norm_preserving_"]
