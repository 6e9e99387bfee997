"""The kernels of slice norms."""

import pytest
import torch

from tests.comparison import assert_matches
from wn_kernels.backends import reference
from wn_kernels.backends.triton import configs, slice_norms
from wn_kernels.backends.triton.launch import recording

SMALL = configs.SliceConfig(4, 4, 8, 4)


@pytest.mark.sanitize
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_dim(dim, splits, dtype, device):
    v = torch.randn(11, 6, 9, device=device).to(dtype)
    dims = [d for d in range(3) if d != dim]
    expected = v.double().square().sum(dims, keepdim=dim is not None).sqrt()
    n = slice_norms(v, dim, 0.0, config=SMALL, splits=splits)
    assert n.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches(n, expected, n.dtype, v.numel())


@pytest.mark.sanitize
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_other_norms(norm, dim, splits, device):
    """Three parts of five tiles or more: one part is shorter. eps clamps some of the norms."""
    for dtype in (torch.float32, torch.float64):
        v = torch.randn(11, 6, 9, device=device, dtype=dtype)
        if dim is not None:
            v.select(dim, 1).zero_()
        n = slice_norms(v, dim, 0.0, norm=norm, config=SMALL, splits=splits)
        assert (n == float("inf")).sum() == (dim is not None)
        eps = n.median().item()
        expected = reference.norms(v.double(), dim, eps, norm)
        n = slice_norms(v, dim, eps, norm=norm, config=SMALL, splits=splits)
        assert_matches(n, expected, dtype, v.numel())


@pytest.mark.parametrize(("n", "r", "split"), [(1, 40000, True), (2, 30000, True), (700, 9, False)])
def test_split_by_shape(n, r, split, device):
    """Few long slices are split, many short ones are not."""
    v = torch.randn(n, r, device=device)
    with recording() as launches:
        slice_norms(v, 0, 0.0)
    assert (len(launches) > 1) == split
    expected = v.double().norm(dim=1, keepdim=True)
    assert_matches(slice_norms(v, 0, 0.0), expected, torch.float32, r)


@pytest.mark.parametrize(("norm", "value"), [("l2", 2400.0), ("l1", 19200.0), ("linf", 300.0)])
@pytest.mark.parametrize("splits", [1, 2])
def test_norm_in_range(norm, value, splits, device):
    """float16 squares overflow at 256; the sum is in float32. A NaN stays one."""
    v = torch.full((5, 64), -300.0, dtype=torch.float16, device=device)
    options = {"norm": norm, "config": SMALL, "splits": splits}
    n = slice_norms(v, 0, 0.0, **options)
    assert_matches(n, torch.full((5, 1), value, dtype=torch.float64), torch.float32, 64)
    v[2, 7] = float("nan")
    n = slice_norms(v, 0, 0.0, **options).view(-1)
    assert torch.isnan(n).tolist() == [False, False, True, False, False]
