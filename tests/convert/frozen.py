"""What a frozen layer has to give."""

import copy

import torch

from tests.comparison import assert_matches
from tests.convert.test_removal import output
from wn_kernels import use_backend


def right(layer, x):
    """The output by the definition, in float64."""
    with torch.no_grad(), use_backend("reference"):
        return output(copy.deepcopy(layer).double(), x.double())


def assert_is_current(layer, x, roundings=4, dtype=torch.float32):
    with torch.no_grad():
        assert_matches(output(layer, x), right(layer, x), dtype, 64, roundings=roundings)
