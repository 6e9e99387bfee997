"""The same bits twice, under `torch.use_deterministic_algorithms(True)`."""

import pytest
import torch

from tests.comparison import assert_same_bits
from tests.compatibility.layers import LAYERS, gradients, made


@pytest.mark.parametrize("name", LAYERS)
def test_deterministic(name):
    layer, x = made(name)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(layer, x), gradients(layer, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(first[0], second[0])
    for key, grad in first[1].items():
        assert_same_bits(grad, second[1][key], key)
