"""PyTorch's operators that compute nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.stand_in.hollow import hollow


@pytest.mark.current
def test_results_have_their_shapes_and_no_values():
    """Of sizes that no test could compute, forward and backward."""
    with hollow():
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(1 << 15, 1 << 15))
        x = torch.randn(1 << 14, 1 << 15, requires_grad=True)
        y = layer(x)
        assert y.shape == (1 << 14, 1 << 15)
        y.backward(torch.randn_like(y))
        assert x.grad.shape == x.shape
        assert layer.parametrizations.weight.original0.grad.shape == (1 << 15, 1)


def test_layouts_and_scalars():
    with hollow():
        x = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
        assert x.stride() == (105, 1, 21, 3)
        y = F.conv2d(x, torch.randn(4, 3, 3, 3), padding=1)
        assert y.shape == (2, 4, 5, 7)
        assert y.to(torch.bfloat16).dtype == torch.bfloat16
        assert y.sum().item() == 1.0
        out = torch.empty(2, 2)
        assert torch.mm(out, out, out=out) is out


def test_it_ends_with_the_block():
    with hollow():
        pass
    assert torch.ones(3).sum().item() == 3.0
