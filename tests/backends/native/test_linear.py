"""Linear layers of the native library: every variant, dtype and layout."""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import wn_kernels.functional as WF
from tests.backends.native.served import DTYPES, HALF, NARROW, WIDE, check_mask, linear
from tests.comparison import Case, assert_matches, assert_same_bits
from tests.planning import planned
from wn_kernels.backends import reference
from wn_kernels.call import NORMS, Call
from wn_kernels.plan import costs

pytestmark = pytest.mark.usefixtures("forced")


# Tiny, one row, some, few of a large layer, with rests of every tile and without, many, and longer
# than a block.
SHAPES = [
    *[(1, 1, 1), (1, 300, 70), (5, 37, 23), (4, 512, 300), (7, 619, 451), (32, 512, 512)],
    *[(2, 5000, 61), (300, 40, 200), (2, 5000, 3)],
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("eps", "bias"), [(0.0, True), (7.0, True), (0.0, False)])
def test_linear(shape, dtypes, eps, bias):
    case = Case(*shape, 0, *dtypes, eps=eps, bias=bias)
    case.check(linear(case))


def call_of(shape, dtypes):
    m, k, n = shape
    return Call(torch.Size((m, k)), torch.Size((n, k)), *dtypes, 0)


# A layer in half precision is computed by a product that is scaled, in bfloat16 or by the library
# itself, by a formed W, or by a W in float32.
@pytest.mark.parametrize(
    ("shape", "dtypes", "variant"),
    [
        (shape, dtypes, variant)
        for shape in [(1, 300, 130), (7, 530, 510), (40, 300, 130), (300, 90, 130)]
        for dtypes in NARROW
        for variant in ("scaled", "materialize", "widen")
        if variant != "scaled" or "scaled" in costs.costs(call_of(shape, dtypes), "native").forward
    ],
)
def test_half_precision(shape, dtypes, variant):
    case = Case(*shape, 0, *dtypes)
    with planned(variant, variant):
        case.check(linear(case))
        for mask in range(1, 16):
            check_mask(case, linear(case), mask)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(1, 300, 70), (4, 512, 600), (40, 300, 130)])
def test_autocast(shape, dtype):
    """The call of an input in autocast's dtype, and gradients in the dtypes of what was given."""
    case = Case(*shape, 0, dtype, torch.float32)
    x = case.x.float().requires_grad_()
    _, *rest = case.leaves()
    with torch.autocast("cpu", dtype):
        y = WF.wn_linear(x, *rest)
        assert WF.weight_norm(*rest[:2]).dtype == torch.float32
    case.check_forward(y)
    grads = torch.autograd.grad(y, [x, *rest], case.dy)
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert_same_bits(grads[0], grads[0].to(dtype).float())
    case.check_backward(grads)


def test_autocast_leaves_float64():
    case = Case(5, 37, 23, 0, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        case.check(linear(case))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
@pytest.mark.parametrize("shape", [(1, 40, 30), (5, 37, 23), (4, 512, 300)])
def test_strides_of_the_input(shape, layout):
    case = Case(*shape, 0, layout=layout)
    case.v = case.v.contiguous()
    case.check(linear(case))


@pytest.mark.parametrize("forward", ["scaled", "materialize"])
@pytest.mark.parametrize("backward", ["scaled", "materialize"])
@pytest.mark.parametrize("keeps", [True, False])
def test_every_variant_of_linear(forward, backward, keeps):
    keeps = keeps and forward == backward == "scaled"
    with planned(forward, backward, "product" if keeps else ""):
        for m, k, n in [
            (1, 300, 130),
            (3, 300, 130),
            (9, 530, 510),
            (40, 300, 130),
            (300, 90, 130),
        ]:
            for eps in (0.0, k**0.5):
                case = Case(m, k, n, 0, eps=eps)
                case.check(linear(case))
                for mask in range(1, 16):
                    check_mask(case, linear(case), mask)


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 1, 3)])
def test_leading_dimensions(leading):
    case = Case(7, 12, 5, 0)
    x = torch.randn(*leading, 12, requires_grad=True)
    y = WF.wn_linear(x, case.v, case.g, case.bias)
    assert y.shape == (*leading, 5)
    wide = [t.detach().double().requires_grad_() for t in (x, case.v, case.g, case.bias)]
    right = reference.linear(*wide, 0, 0.0)
    assert_matches(y, right, torch.float32, 12)
    y.sum().backward()  # of an expanded gradient
    right.sum().backward()
    assert_matches(x.grad, wide[0].grad, torch.float32, 12)


@settings(max_examples=200)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(2, 140), st.integers(2, 140)),
    dtypes=st.sampled_from(DTYPES),
    eps=st.sampled_from([0.0, 6.0]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fuzz_linear(shape, dtypes, eps, bias, seed):
    # A direction of few elements has a gradient hardly larger than the rounding of half precision.
    assume(min(shape[1:]) >= 16 or not set(dtypes) & set(HALF))
    case = Case(*shape, 0, *dtypes, eps=eps, bias=bias, seed=seed)
    case.check(linear(case))


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("eps", [0.0, 2.0])
def test_derivatives_of_linear(m, eps):
    case = Case(m, 6, 5, 0, torch.float64, eps=eps)
    assert gradcheck(linear(case), case.leaves(), check_batched_grad=True)
    assert gradgradcheck(linear(case), case.leaves())


# One row, few of a large weight, every rest of a vector with lengths that are no multiple of what
# it holds of each column, rests of tiles, rows that threads share, and more than are taken at once:
# every product is this library's.
OWN_PRODUCTS = [
    (shape, dtypes)
    for shape in [
        *[
            (1, 600, 500),
            (1, 2500, 1100),
            (1, 70, 5000),
            (5, 600, 500),
            (32, 700, 900),
            (6, 9, 300),
        ],
        *[(31, 640, 257), (33, 1030, 301), (65, 33, 47), (203, 41, 120), (2100, 30, 70)],
        (1500, 20, 1600),
        *[(2, 41, 700), (3, 77, 330), (7, 210, 97), (9, 129, 171), (17, 255, 83), (40, 517, 66)],
    ]
    for dtypes in DTYPES
    if costs.is_own(call_of(shape, dtypes))
]


@pytest.mark.parametrize(("shape", "dtypes"), OWN_PRODUCTS)
@pytest.mark.parametrize("norm", NORMS)
def test_own_products(shape, dtypes, norm):
    case = Case(*shape, 0, *dtypes)
    case.take(norm)
    with planned("scaled", "scaled"):
        case.check(lambda *inputs: WF.wn_linear(*inputs, norm=norm))


@pytest.mark.parametrize(("shape", "dtypes"), OWN_PRODUCTS)
def test_same_bits_whatever_the_threads(shape, dtypes):
    case = Case(*shape, 0, *dtypes)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            leaves = case.leaves()
            with planned("scaled", "scaled"):
                y = WF.wn_linear(*leaves)
            found.append(
                (WF.weight_norm(*leaves[1:3]), y, *torch.autograd.grad(y, leaves, case.dy))
            )
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*found, strict=True):
        for other in others:
            assert_same_bits(one, other)


@pytest.mark.parametrize(("shape", "dtypes"), OWN_PRODUCTS)
def test_no_product_of_a_library(shape, dtypes):
    """Nor a sum, whose bits would be the library's: PyTorch's operations only reshape and copy."""
    case = Case(*shape, 0, *dtypes)
    leaves = case.leaves()
    with torch.profiler.profile() as profile, planned("scaled", "scaled"):
        y = WF.wn_linear(*leaves)
        torch.autograd.grad(y, leaves, case.dy)
    ran = {event.key for event in profile.key_averages()}
    assert "aten::empty" in ran
    products = re.compile(r"aten::.*(mm|mv|dot|linear|addr|ger|sum|einsum)")
    assert not {key for key in ran if products.match(key)}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1024), (256, 1025), (257, 31), (700, 2500)])
def test_the_gradient_of_one_row(shape, dtype):
    """dX = dY W, in tiles of 256 rows and 1024 columns of V, whose norms a tuned path may have
    formed W from."""
    n, k = shape
    case = Case(1, k, n, 0, dtype)
    for variants in (("scaled", "scaled", "product"), ("scaled", "materialize")):
        with planned(*variants):
            case.check(linear(case))
