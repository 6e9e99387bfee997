"""The one-pass forward of a linear layer where programs share its sums."""

import pytest

from tests.backends.triton.test_linear import DTYPES, SMALL
from tests.comparison import Case, assert_matches, assert_same_bits
from wn_kernels.backends.triton import linear, slice_norms
from wn_kernels.backends.triton.launch import recording


@pytest.mark.sanitize
@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("x_dtype", "v_dtype", "norm"),
    [(*DTYPES[1], "l2"), (*DTYPES[2], "linf"), (*DTYPES[3], "l1"), (*DTYPES[4], "l2")],
)
def test_one_pass_that_shares_r(splits, keep, x_dtype, v_dtype, norm, device):
    """Five tiles of rows and four steps, the last of them short, by programs that no number of
    which divides. A sum over shares does not depend on their order."""
    case = Case(70, 50, 41, 0, x_dtype, v_dtype, device=device)
    case.take(norm)
    inputs, options = (case.x, case.v, case.g, case.bias, 0, 0.0, "one_pass", keep), {"norm": norm}
    config = SMALL._replace(splits=splits)
    with recording() as launches:
        linear(*inputs, **options, config=config)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["one_pass_kernel", "add_parts_kernel"]
    y, n, *kept = linear(*inputs, **options, config=config)
    case.check_forward(y)
    right = slice_norms(case.v.double(), 0, 0.0, norm=norm)
    assert_matches(n[right.isfinite()], right[right.isfinite()], n.dtype, 50, what="n")
    if keep:
        right = case.x.double() @ case.v.double().t()
        assert_matches(kept[0][-70:], right, x_dtype, 50, roundings=3)
    for first, second in zip((y, n, *kept), linear(*inputs, **options, config=config), strict=True):
        assert_same_bits(first, second)
