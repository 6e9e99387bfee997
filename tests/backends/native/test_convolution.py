"""Convolutions of the native library: every variant, dtype and layout."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from tests.backends.native.served import HALF, NARROW, WIDE, check_mask, convolution_plan
from tests.comparison import ConvCase, assert_matches, assert_same_bits
from tests.planning import planned
from tests.test_convolution import KINDS, LAYERS, case_of, cases, check
from wn_kernels import use_backend

pytestmark = pytest.mark.usefixtures("forced")


@pytest.mark.parametrize("dtypes", NARROW)
@pytest.mark.parametrize("kind", ["1d", "grouped", "depthwise", "2d", "3d", "up", "up grouped"])
@pytest.mark.parametrize("variant", ["materialize", "kept", "widen"])
def test_half_precision_convolutions(kind, variant, dtypes):
    case = case_of(KINDS, kind, 0, *dtypes)
    forward = "materialize" if variant == "kept" else variant
    with planned(*convolution_plan(case, forward, variant)):
        case.check(case.layer)
        for mask in range(1, 16):
            check_mask(case, case.layer, mask)


@pytest.mark.parametrize("dtypes", NARROW)
def test_positions_in_half_precision(dtypes):
    case = ConvCase(2, 16, 16, (30,), (16,), 2, *dtypes)
    case.check(case.layer)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_convolution(dtype):
    case = ConvCase(2, 8, 6, (7, 9), (3, 3), 0, dtype, torch.float32)
    x = case.x.float().requires_grad_()
    _, *rest = case.leaves()
    with torch.autocast("cpu", dtype):
        y = case.layer(x, *rest)
    case.check_forward(y)
    case.check_backward(torch.autograd.grad(y, [x, *rest], case.dy))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("eps", "dtype"), [(0.0, torch.float32), (3.0, torch.float64)])
def test_kinds(kind, eps, dtype):
    if kind == "same":  # an even kernel: the input is padded first
        return
    case = case_of(KINDS, kind, 0, dtype, eps=eps, bias=eps == 0)
    case.check(case.layer)


HALF_PATHS = [("materialize", "materialize"), ("materialize", "kept"), ("widen", "widen")]
FORWARDS, BACKWARDS = ["late", "materialize", "unfold"], ["late", "materialize", "unfold", "kept"]


@pytest.mark.parametrize("kind", ["1d", "grouped", "depthwise", "2d", "3d", "up", "up grouped"])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("backward", BACKWARDS)
def test_every_variant_of_convolutions(kind, forward, backward):
    case = case_of(KINDS, kind)
    with planned(*convolution_plan(case, forward, backward)):
        case.check(case.layer)
        for mask in range(1, 16):
            check_mask(case, case.layer, mask)


@pytest.mark.parametrize("variant", ["output", "materialize"])
@pytest.mark.parametrize("weight_too", [False, True])
def test_channels_last(variant, weight_too):
    case = case_of(KINDS, "2d")
    case.x = case.x.to(memory_format=torch.channels_last)
    if weight_too:
        case.v = case.v.to(memory_format=torch.channels_last)
    with planned(variant, variant):
        y, grads = case.check(case.layer)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert grads[1].stride() == case.v.stride()


UNFOLDED = ["wide", "narrow", "grouped", "up", "up grouped", "positions"]
WINDOWS = ["lines", "strided lines", "planes", "up lines", "up planes", "scaled taps"]
SHARED = ["shared lines", "shared planes", "shared scaled taps"]


@pytest.mark.parametrize("kind", UNFOLDED + WINDOWS + SHARED)
@pytest.mark.parametrize("dtype", WIDE)
def test_unfolded(kind, dtype):
    """Weights longer than a segment, whose rows come in several chunks; rests of every tile. Lines
    of pixels that windows divide, and several in a window; threads that share the columns."""
    sizes, dim, options = {
        "wide": ((2, 193, 37, (19,), (7,)), 0, {"padding": 3}),
        "narrow": ((3, 150, 9, (5, 4), (3, 9)), 0, {"padding": (1, 4), "stride": (1, 2)}),
        "grouped": ((1, 96, 66, (50,), (31,)), 0, {"padding": 15, "groups": 2}),
        "up": ((2, 301, 75, (7,), (16,)), 0, {"transposed": True, "stride": 8}),
        "up grouped": ((1, 300, 120, (9,), (40,)), 0, {"transposed": True, "groups": 3}),
        "positions": ((2, 96, 96, (49,), (40,)), 2, {"groups": 2, "padding": 20}),
        "lines": ((3, 21, 18, (100,), (7,)), 0, {"padding": 6, "dilation": 2}),
        "strided lines": ((2, 21, 18, (300,), (5,)), 0, {"padding": 3, "stride": 2}),
        "planes": ((2, 5, 7, (6, 9, 11), (2, 3, 3)), 0, {"padding": 2, "dilation": (2, 1, 3)}),
        "up lines": ((3, 19, 22, (90,), (5,)), 0, {"transposed": True, "stride": 3}),
        "up planes": ((2, 9, 5, (12, 14), (3, 3)), 0, {"transposed": True, "padding": 1}),
        "scaled taps": ((2, 17, 16, (150,), (16,)), 2, {"padding": 9, "stride": 2}),
        "shared lines": ((3, 33, 10, (190,), (5,)), 0, {"padding": 4, "dilation": 2}),
        "shared planes": ((2, 20, 5, (17, 18), (3, 3)), 0, {"padding": 1}),
        "shared scaled taps": ((1, 35, 6, (530,), (16,)), 2, {"padding": 9}),
    }[kind]
    case = ConvCase(*sizes, dim, dtype, **options)
    with planned("unfold", "unfold"):
        found = case.check(case.layer)
        threads = torch.get_num_threads()
        try:
            for count in (1, 3, 4):
                torch.set_num_threads(count)
                y, grads = case.check(case.layer)
                for one, other in zip((y, *grads), (found[0], *found[1]), strict=True):
                    assert_same_bits(one, other)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "codec up 2048"])
def test_layers_of_models(name):
    case = case_of(LAYERS, name, 2 if name == "positions" else 0)
    case.check(case.layer)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("eps", [0.0, 9.0])
@pytest.mark.parametrize("channels", [(16, 16), (5, 6)])
def test_positions_of_a_kernel(channels, dtype, eps):
    """A weight whose slices are columns, and a square one, whose flat g fits both dims."""
    case = ConvCase(2, *channels, (30,), (16,), 2, dtype, eps=eps)
    case.check(case.layer)
    for mask in range(1, 16):
        check_mask(case, case.layer, mask)
    with use_backend("auto"):
        case.check_forward(case.layer(case.x, case.v, case.g.flatten(), case.bias))
    case.v[..., 3] = 0
    leaves = case.leaves()
    grads = torch.autograd.grad(case.layer(*leaves).square().sum(), leaves)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert bool((grads[1][..., 3] == 0).all()) == (eps == 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fuzz_convolution(rank, transposed):
    served = st.sampled_from(WIDE).flatmap(
        lambda dtype: cases(rank, transposed, dims=[0], dtypes=[dtype])
    )

    @settings(max_examples=140)
    @given(case=served, path=st.tuples(st.sampled_from(FORWARDS), st.sampled_from(BACKWARDS)))
    def run(case, path):
        run_path(case, path)

    narrow = st.sampled_from(HALF).flatmap(
        lambda dtype: cases(rank, transposed, dims=[0], dtypes=[dtype])
    )

    @settings(max_examples=60)
    @given(case=narrow, path=st.sampled_from(HALF_PATHS))
    def run_half(case, path):
        run_path(case, path)

    def run_path(case, path):
        case.v = case.v.contiguous()
        # "same" with an even kernel pads the input first.
        assume(case.options.get("padding") != "same")
        with planned(*convolution_plan(case, *path)):
            check(case)

    run()
    run_half()


@pytest.mark.parametrize("variant", BACKWARDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(2048,), (40, 40), (14, 14, 14)])
def test_gradient_of_a_bias(sizes, transposed, variant):
    """Its error is that of one rounding, where oneDNN's sum is wrong by up to 30 times as much."""
    case = ConvCase(4, 3, 5, sizes, (3,) * len(sizes), 0, transposed=transposed)
    inputs = case.leaves()
    with planned(*convolution_plan(case, "materialize", variant)):
        y = case.layer(*inputs)
    dy = torch.rand_like(y)
    *_, db = torch.autograd.grad(y, inputs, dy)
    right = dy.double().transpose(0, 1).flatten(1).sum(1)
    assert_matches(db, right, torch.float32, length=0, roundings=1)


@pytest.mark.parametrize("kind", ["1d", "grouped", "up", "up grouped"])
def test_derivatives_of_convolutions(kind):
    (_, inputs, outputs, _, taps), options = KINDS[kind]
    case = ConvCase(1, inputs, outputs, (4,), taps, 0, torch.float64, **options)
    assert gradcheck(case.layer, case.leaves())
    assert gradgradcheck(case.layer, case.leaves())
