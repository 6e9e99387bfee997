"""Copies with channels last."""

import pytest
import torch

from tests.comparison import assert_same_bits
from wn_kernels.backends.triton.launch import Launcher, laid_out, target_of
from wn_kernels.backends.triton.passes import Pass
from wn_kernels.backends.triton.repack import repack


def repacked(x):
    """The copy, and what made it."""
    run = Pass("x")
    name, packed = repack(run, target_of(x), "x", laid_out(x.shape, x.stride(), x.dtype))
    (found,) = run.returning(name)(x)
    assert found.stride() == packed.stride()
    return found, [function for function, _, _ in run.steps]


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(2, 37, 70), (3, 5, 9, 11), (1, 40, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_first(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    found, (step,) = repacked(x)
    assert isinstance(step, Launcher)
    assert found.stride(1) == 1
    assert_same_bits(found, x)


def test_nothing_to_do(device):
    x = torch.randn(2, 9, 5, device=device).movedim(-1, 1)
    found, steps = repacked(x)
    assert found is x
    assert not steps


def test_pixels_that_do_not_merge(device):
    """PyTorch copies what has no one stride along its pixels."""
    x = torch.randn(2, 6, 9, 11, device=device)[..., ::2]
    found, (step,) = repacked(x)
    assert not isinstance(step, Launcher)
    assert_same_bits(found, x)
