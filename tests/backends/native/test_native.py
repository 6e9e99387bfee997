"""The native library: every variant and order, what it serves and what it leaves alone."""

import functools
import re
from contextlib import nullcontext

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import wn_kernels.functional as WF
from tests.comparison import Case, ConvCase, assert_matches, assert_same_bits, assert_zero
from tests.planning import planned
from tests.test_convolution import KINDS, LAYERS, case_of, cases, check
from wn_kernels import WNConv2d, WNLinear, plan, prepare, use_backend
from wn_kernels.backends import native, reference
from wn_kernels.call import Call, kept_shape, scale_dtype
from wn_kernels.plan import costs

WIDE = [torch.float32, torch.float64]
HALF = [torch.bfloat16, torch.float16]
# Of x and of V: one dtype, that of an autocast layer, and other mixtures.
DTYPES = [
    *[(dtype, dtype) for dtype in (*WIDE, *HALF)],
    *[(dtype, torch.float32) for dtype in HALF],
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
]
NARROW = [pair for pair in DTYPES if pair[0] in HALF]
# Tiny, one row, some, few of a large layer, with rests of every tile and without, many, and longer
# than a block.
SHAPES = [
    *[(1, 1, 1), (1, 300, 70), (5, 37, 23), (4, 512, 300), (7, 619, 451), (32, 512, 512)],
    *[(2, 5000, 61), (300, 40, 200), (2, 5000, 3)],
]


@pytest.fixture(scope="session", autouse=True)
def _built():
    native.build()


@pytest.fixture(autouse=True)
def _forced():
    """A call that the library leaves alone raises."""
    with use_backend("native"):
        yield


def linear(case):
    return lambda *inputs: WF.wn_linear(*inputs, eps=case.eps)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("eps", "bias"), [(0.0, True), (7.0, True), (0.0, False)])
def test_linear(shape, dtypes, eps, bias):
    case = Case(*shape, 0, *dtypes, eps=eps, bias=bias)
    case.check(linear(case))


def call_of(shape, dtypes):
    m, k, n = shape
    return Call(torch.Size((m, k)), torch.Size((n, k)), *dtypes, 0)


# What a layer in half precision may be computed by: a product that is scaled, in bfloat16 or by the
# library itself; a formed W; and one in float32.
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


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_convolution(dtype):
    case = ConvCase(2, 8, 6, (7, 9), (3, 3), 0, dtype, torch.float32)
    x = case.x.float().requires_grad_()
    _, *rest = case.leaves()
    with torch.autocast("cpu", dtype):
        y = case.layer(x, *rest)
    case.check_forward(y)
    case.check_backward(torch.autograd.grad(y, [x, *rest], case.dy))


def test_autocast_leaves_float64():
    case = Case(5, 37, 23, 0, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        case.check(linear(case))


@pytest.mark.parametrize("dtypes", NARROW)
@pytest.mark.parametrize("kind", ["linear", "one row", "1d", "grouped", "2d", "3d", "up"])
@pytest.mark.parametrize("variant", ["", "materialize", "widen"])
def test_second_derivatives_in_half_precision(kind, dtypes, variant):
    """Those of a loss of the values and of all their gradients, beside the definition's in float64,
    by the planned variant and by the others."""

    def second(layer, leaves, dy):
        y = layer(*leaves)
        grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
        wide = scale_dtype(leaves[1])
        loss = sum(t.to(wide).square().mean() for t in (y, *grads) if t.requires_grad)
        return torch.autograd.grad(loss, leaves[:3])

    if kind in ("linear", "one row"):
        case = Case(1 if kind == "one row" else 9, 48, 40, 0, *dtypes)
        plans = planned(variant, variant)
        definition = functools.partial(reference.linear, dim=0, eps=0.0)
    else:
        case = case_of(KINDS, kind, 0, *dtypes)
        plans = planned(*convolution_plan(case, variant, variant))
        definition = functools.partial(reference.convolution, conv=case.geometry(), dim=0, eps=0.0)
    with plans if variant else nullcontext():
        found = second(
            linear(case) if isinstance(case, Case) else case.layer, case.leaves(), case.dy
        )
    wide = [t.detach().double().requires_grad_() for t in case.leaves()]
    right = second(definition, wide, case.dy.double())
    for name, grad, expected in zip("xvg", found, right, strict=True):
        assert grad.dtype == getattr(case, name).dtype
        assert_matches(grad, expected, dtypes[0], case.length, roundings=4, what=name)


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


def check_mask(case, layer, mask):
    """Only the gradients seen for, and each as if all were."""
    needs = [bool(mask >> i & 1) for i in range(4)]
    inputs = (case.x, case.v, case.g, case.bias)
    leaves = [t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
    layer(*leaves).backward(case.dy)
    assert [leaf.grad is not None for leaf in leaves] == needs
    every = case.grads
    case.grads = [grad if need else None for grad, need in zip(every, needs, strict=True)]
    case.check_backward([leaf.grad for leaf in leaves])
    case.grads = every


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("eps", "dtype"), [(0.0, torch.float32), (3.0, torch.float64)])
def test_kinds(kind, eps, dtype):
    if kind == "same":  # an even kernel: the input is padded first
        return
    case = case_of(KINDS, kind, 0, dtype, eps=eps, bias=eps == 0)
    case.check(case.layer)


def convolution_plan(case, forward, backward):
    """Arguments of `planned` by the variants' names: "late", at the side that the scale belongs to,
    "materialize", "kept", or "unfold"."""
    names = {"late": case.geometry().scale_axis(case.dim), "kept": "materialize"}
    variants = (names.get(variant, variant) for variant in (forward, backward))
    return *variants, "weight" if backward == "kept" else ""


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


@pytest.mark.parametrize("kind", ["wide", "narrow", "grouped", "up", "up grouped", "positions"])
@pytest.mark.parametrize("dtype", WIDE)
def test_unfolded(kind, dtype):
    """Weights longer than a segment, whose rows come in several chunks; rests of every tile."""
    sizes, dim, options = {
        "wide": ((2, 193, 37, (19,), (7,)), 0, {"padding": 3}),
        "narrow": ((3, 150, 9, (5, 4), (3, 9)), 0, {"padding": (1, 4), "stride": (1, 2)}),
        "grouped": ((1, 96, 66, (50,), (31,)), 0, {"padding": 15, "groups": 2}),
        "up": ((2, 301, 75, (7,), (16,)), 0, {"transposed": True, "stride": 8}),
        "up grouped": ((1, 300, 120, (9,), (40,)), 0, {"transposed": True, "groups": 3}),
        "positions": ((2, 96, 96, (49,), (40,)), 2, {"groups": 2, "padding": 20}),
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


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        *[(shape, 0) for shape in [(9,), (6, 5), (6, 5, 4), (3, 4, 5, 2), (3, 9000)]],
        *[((6, 5, 4), -3), ((16, 16), 1), ((300, 40), 1), ((7, 30, 17), 2), ((16, 2, 16), -3)],
        # Short rows that make longer ones, and more blocks of rows than chunks.
        *[((96, 4, 5), 2), ((5001, 513), 1)],
        # Neither rows nor columns: a few columns of each slice, or all of one.
        *[((70, 5, 4), 1), ((7, 30, 17), 1), ((3, 4, 16, 3), -2), ((5, 9, 1, 2), 1)],
        *[(shape, None) for shape in [(20,), (130, 7), (3, 2, 70, 9), (1, 16)]],
    ],
)
@pytest.mark.parametrize("dtype", [*WIDE, *HALF])
@pytest.mark.parametrize("flat", [False, True])
def test_weight_norm(shape, dim, dtype, flat):
    axis = None if dim is None else dim % len(shape)
    if flat and axis != 0:
        return
    v = torch.randn(shape, dtype=dtype).requires_grad_()
    kept = kept_shape(shape, axis)
    g = torch.rand(kept, dtype=dtype) + 0.5
    g = (g.flatten() if flat else g).requires_grad_()
    dw = torch.randn(shape, dtype=dtype)
    w = WF.weight_norm(v, g, dim=dim)
    wide = [t.detach().double().requires_grad_() for t in (v, g)]
    expected = reference.weight_norm(wide[0], wide[1].view(kept), axis, 0.0)
    assert_matches(w, expected, dtype, v.numel())
    dv, dg = torch.autograd.grad(w, (v, g), dw)
    right_dv, right_dg = torch.autograd.grad(expected, wide, dw.double())
    terms = dw.double().norm().item()
    assert_matches(dg, right_dg, dtype, v.numel(), terms=terms)
    if len(shape) > 1:
        scale = reference.slice_scale(wide[0], wide[1].view(kept), axis, 0.0)
        size = (scale * dw.double()).norm().item()
        assert_matches(dv, right_dv, dtype, v.numel(), roundings=3, scale=size)


def test_long_columns_keep_their_digits():
    """Blocks of rows are summed in float32, and their sums in float64: all of these squares in
    float32 would be off by a hundred roundings."""
    v = torch.rand(1 << 18, 16) + 0.5
    exact = v.double() / v.double().norm(dim=0, keepdim=True)
    w = WF.weight_norm(v, torch.ones(1, 16), dim=1)
    # The sum's rounding, a norm's, a quotient's and a product's.
    assert ((w.double() - exact).abs() / exact).max() < 2 * torch.finfo(v.dtype).eps


def test_weight_norm_keeps_the_layout():
    v = torch.randn(6, 5, 3, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = WF.weight_norm(v, torch.ones(6, 1, 1, 1))
    assert w.stride() == v.stride()
    # A gradient that lies otherwise, and that somebody else may hold.
    dw = torch.randn(w.shape)
    before = dw.clone()
    (dv,) = torch.autograd.grad(w, v, dw)
    assert dv.stride() == v.stride()
    assert_same_bits(dw, before)
    wide = v.detach().double().requires_grad_()
    right = torch.autograd.grad(
        reference.weight_norm(wide, torch.ones(6, 1, 1, 1).double(), 0, 0.0), wide, dw.double()
    )[0]
    assert_matches(dv, right, torch.float32, 60, roundings=3, scale=dw.norm().item())


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


# --- second derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("eps", [0.0, 2.0])
def test_derivatives_of_linear(m, eps):
    case = Case(m, 6, 5, 0, torch.float64, eps=eps)
    assert gradcheck(linear(case), case.leaves(), check_batched_grad=True)
    assert gradgradcheck(linear(case), case.leaves())


@pytest.mark.parametrize("kind", ["1d", "grouped", "up", "up grouped"])
def test_derivatives_of_convolutions(kind):
    (_, inputs, outputs, _, taps), options = KINDS[kind]
    case = ConvCase(1, inputs, outputs, (4,), taps, 0, torch.float64, **options)
    assert gradcheck(case.layer, case.leaves())
    assert gradgradcheck(case.layer, case.leaves())


def test_derivatives_of_weight_norm():
    v = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    for g in (torch.rand(3, 1, 1, dtype=torch.float64), torch.rand(3, dtype=torch.float64)):
        g.requires_grad_()
        assert gradcheck(WF.weight_norm, (v, g))
        assert gradgradcheck(WF.weight_norm, (v, g))
    for shape, dim in (((3, 16), 1), ((3, 4, 4), 1), ((3, 4, 4), None)):
        v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        g = torch.rand(kept_shape(shape, dim), dtype=torch.float64, requires_grad=True)
        of_dim = functools.partial(WF.weight_norm, dim=dim)
        assert gradcheck(of_dim, (v, g))
        assert gradgradcheck(of_dim, (v, g))


# --- numbers out of the ordinary -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 20, 18), (9, 20, 18), (4, 512, 300)])
def test_dead_slice(shape):
    case = Case(*shape, 0)
    case.v[3].zero_()
    leaves = case.leaves()
    y = WF.wn_linear(*leaves)
    assert torch.isfinite(y).all()
    assert_same_bits(y[:, 3], case.bias[3].expand(shape[0]))
    grads = torch.autograd.grad(y, leaves, case.dy)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert_zero(grads[1][3])
    assert_zero(grads[2][3])


@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 40), 0), ((9, 6, 4), 1), ((8, 20), 1), ((5, 8), None)]
)
def test_dead_slice_of_a_weight(shape, dim):
    """Of zeros: a weight and gradients of zeros. One that is merely tiny is left to float64."""
    v = torch.randn(shape)
    dead = v if dim is None else v.select(dim, 3)
    g = torch.rand(kept_shape(shape, dim)) + 0.5
    dead.zero_()
    v.requires_grad_()
    g.requires_grad_()
    w = WF.weight_norm(v, g, dim=dim)
    grads = torch.autograd.grad(w, (v, g), torch.randn(shape))
    assert all(torch.isfinite(t).all() for t in (w, *grads))
    for t in (w, *grads) if dim is None else (t.select(dim, 3) for t in (w, *grads)):
        assert_zero(t)
    if dim is not None:
        assert all(t.count_nonzero() == t.numel() * (1 - 1 / shape[dim]) for t in (w, *grads))
    dead.data[-1] = 1e-30
    with pytest.raises(RuntimeError, match="forced but cannot serve"):
        WF.weight_norm(v, g, dim=dim)


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e12, 1e25, float("nan")])
@pytest.mark.parametrize("m", [1, 6])
def test_norms_out_of_range_are_left_alone(factor, m):
    """Squares that leave float32, and those near it: by the definition in float64."""
    case = Case(m, 30, 20, 0)
    case.v[3] *= factor
    with pytest.raises(RuntimeError, match="forced but cannot serve this call: the native library"):
        WF.wn_linear(case.x, case.v, case.g)
    with pytest.raises(RuntimeError, match="forced but cannot serve"):
        WF.weight_norm(case.v, case.g)
    with use_backend("auto"):
        y = WF.wn_linear(case.x, case.v, case.g)
    right = reference.linear(case.x.double(), case.v.double(), case.g.double(), None, 0, 0.0)
    if factor == factor:
        assert_matches(y, right, torch.float32, 30)
    else:
        assert torch.isnan(y[:, 3]).all()


# --- what it serves ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 1, "g": torch.ones(1, 6)},
        {"dim": None, "g": torch.tensor(1.0)},
        {"input": torch.randn(2, 6, dtype=torch.float64)},
        {"bias": torch.randn(4).double()},
        {"v": torch.randn(6, 4).t()},
        {"input": torch.empty(0, 6)},
        {"g": torch.ones(4, 1).bfloat16()},
    ],
)
def test_other_calls_are_left_alone(change):
    arguments = {"input": torch.randn(2, 6), "v": torch.randn(4, 6), "g": torch.ones(4, 1)}
    with pytest.raises(RuntimeError, match="'native' was forced but cannot serve"):
        WF.wn_linear(**(arguments | change))
    with use_backend("auto"):
        assert WF.wn_linear(**(arguments | change)).shape[-1] == 4


def test_wrong_calls_get_the_usual_errors():
    x, v, g = torch.randn(2, 6), torch.randn(4, 6), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"input of shape \(2, 5\) does not fit"):
        WF.wn_linear(x[:, :5], v, g)
    with pytest.raises(TypeError, match="groups must be an int"):
        WF.wn_conv1d(x[None], v[..., None], g[..., None], groups=1.0)
    for function in (WF.weight_norm, lambda v, g: WF.wn_conv1d(x[None], v, g)):
        with pytest.raises(ValueError, match=r"dim=0 is out of range|v must be 3-d"):
            function(torch.tensor(2.0), torch.ones(1))
    with use_backend("auto"), pytest.raises(TypeError, match=r"v must be a torch\.Tensor"):
        WF.wn_linear(x, [1.0], g)


def test_what_sees_through_a_call_does():
    """Transforms, forward-mode AD, autocast and modes meet operators that they know."""
    case = Case(3, 6, 4, 0)
    inputs = (case.x, case.v, case.g, case.bias)
    with use_backend("auto"):
        _, tangent = torch.func.jvp(lambda x: WF.wn_linear(x, *inputs[1:]), inputs[:1], inputs[:1])
        assert_matches(tangent + case.bias, case.y, torch.float32, 6)
        case.check_forward(torch.vmap(WF.wn_linear, (0, None, None, None))(*inputs))
        with torch.autocast("cpu", torch.bfloat16):
            assert WF.wn_linear(*inputs).dtype == torch.bfloat16

        class Mode(torch.utils._python_dispatch.TorchDispatchMode):
            seen = 0

            def __torch_dispatch__(self, function, types, arguments=(), options=None):
                self.seen += 1
                return function(*arguments, **(options or {}))

        with Mode() as mode:
            WF.wn_linear(*inputs)
        assert mode.seen


def test_a_subclass_is_left_alone():
    class Own(torch.Tensor):
        pass

    x = torch.randn(2, 6).as_subclass(Own)
    with use_backend("auto"):
        assert isinstance(WNLinear(6, 4)(x), Own)


# --- as a node of the graph ----------------------------------------------------------------------


def test_saved_memory():
    """What the plain layer saves, the norms, and the product where it is small; no weight."""
    for layer, x in [
        (WNLinear(512, 300), torch.randn(4, 512, requires_grad=True)),
        (WNLinear(64, 64), torch.randn(32, 64, requires_grad=True)),
    ]:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            layer(x)
        owned = {t.data_ptr() for t in (x, *layer.parameters())}
        extra = sum(t.numel() for t in saved if t.data_ptr() not in owned)
        assert saved
        assert extra <= layer.weight_g.numel() + x.shape[0] * layer.out_features


def test_a_weight_that_passes_leaves_no_trace():
    """Weights of several layers take the same memory in turn. A graph holds none of them."""
    layers = [Case(40, 64, 64, 0, torch.float32) for _ in range(3)]
    leaves = [case.leaves() for case in layers]
    x = leaves[0][0]
    exact = [[t.detach().double().requires_grad_() for t in case] for case in leaves]

    def grads(inputs, layer):
        x = y = inputs[0][0]
        for _, v, g, bias in inputs:
            y = torch.tanh(layer(y, v, g, bias))
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        parameters = [t for case in inputs for t in case[1:3]]
        return torch.autograd.grad((y.square() + slope.square().sum()).sum(), parameters)

    found = grads(leaves, WF.wn_linear)
    expected = grads(exact, lambda *t: reference.layer(*t, None, 0, 0.0))
    for grad, right in zip(found, expected, strict=True):
        assert_matches(grad, right, torch.float32, 64 * x.numel(), roundings=20)


def test_an_activation_in_place_and_a_checkpoint():
    layer, x = WNConv2d(3, 4, 3), torch.randn(2, 3, 8, 8, requires_grad=True)
    plain = torch.autograd.grad(layer(x).relu().sum(), layer.weight_v)[0]
    again = torch.utils.checkpoint.checkpoint(
        lambda x: torch.relu_(layer(x)), x, use_reentrant=False
    )
    assert_same_bits(torch.autograd.grad(again.sum(), layer.weight_v)[0], plain)


def test_a_changed_weight_is_noticed():
    layer = WNLinear(6, 4)
    y = layer(torch.randn(2, 6))
    with torch.no_grad():
        layer.weight_v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# One row, and few of a large weight: every product is this library's.
OWN_PRODUCTS = [
    (shape, dtypes)
    for shape in [(1, 600, 500), (1, 2500, 1100), (1, 70, 5000), (5, 600, 500), (32, 700, 900)]
    for dtypes in DTYPES
    if native.limits.is_own(call_of(shape, dtypes))
]


@pytest.mark.parametrize(("shape", "dtypes"), OWN_PRODUCTS)
def test_same_bits_whatever_the_threads(shape, dtypes):
    case = Case(*shape, 0, *dtypes)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            leaves = case.leaves()
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
    with torch.profiler.profile() as profile:
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


# --- planning ------------------------------------------------------------------------------------


def test_a_call_is_planned_once(monkeypatch):
    prepare.forget()
    seen = []
    choose = plan.choose
    monkeypatch.setattr(plan, "choose", lambda *call: seen.append(call) or choose(*call))
    layer = WNConv2d(3, 4, 3)
    for _ in range(3):
        layer(torch.randn(2, 3, 8, 8))
    assert [backend for _, backend in seen] == ["native"]
    layer(torch.randn(2, 3, 8, 9))
    assert len(seen) == 2
    prepare.forget()
    layer(torch.randn(2, 3, 8, 9))
    assert len(seen) == 3
