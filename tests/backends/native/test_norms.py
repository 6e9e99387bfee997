"""The norms l1 and linf in the native library: every pass that takes norms or writes dV.

`LayerCase.take` gives every slice several largest elements of both signs, and one slice of zeros.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import wn_kernels.functional as WF
from tests.backends.native.served import DTYPES, HALF, NARROW, WIDE, convolution_plan
from tests.comparison import Case, ConvCase, assert_matches, assert_same_bits, assert_zero
from tests.planning import planned
from tests.test_convolution import KINDS, case_of
from wn_kernels import use_backend
from wn_kernels.backends import reference
from wn_kernels.call import NORMS, kept_shape

OTHERS = ("l1", "linf")


pytestmark = pytest.mark.usefixtures("forced")


def taken(case, norm, clamps=False):
    """The case with another norm. If it `clamps`, then eps is above the norm of every other
    slice."""
    case.take(norm)
    if clamps:
        n = reference.norms(case.v.double(), case.dim, 0.0, norm)
        case.eps = 0.75 * n[n.isfinite()].max().item()
        case.refer()
    return case


def linear(case):
    return lambda *inputs: WF.wn_linear(*inputs, eps=case.eps, norm=case.norm)


# --- layers --------------------------------------------------------------------------------------

# One row, few of a small weight, few of a large one, and many; with rests of every tile. The last
# one has ties in more groups than are noted.
SHAPES = [(1, 300, 70), (1, 3, 20), (5, 37, 23), (4, 512, 600), (40, 300, 130), (40, 4500, 3)]


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_linear(dtypes, norm):
    for i, shape in enumerate(SHAPES):
        case = taken(Case(*shape, 0, *dtypes), norm, clamps=i % 2 == 1)
        case.check(linear(case))


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("variant", ["scaled", "kept", "materialize"])
def test_every_variant_of_linear(variant, norm):
    """With the product that is kept, dV starts from V alone."""
    name = "scaled" if variant == "kept" else variant
    with planned(name, name, "product" if variant == "kept" else ""):
        for shape in [(1, 300, 130), (9, 530, 510), (40, 300, 130), (300, 90, 130)]:
            for dtype in WIDE:
                case = taken(Case(*shape, 0, dtype), norm, clamps=shape[0] == 40)
                case.check(linear(case))


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("variant", ["materialize", "widen"])
def test_half_precision(variant, norm):
    with planned(variant, variant):
        for dtypes in NARROW:
            case = taken(Case(7, 130, 110, 0, *dtypes), norm)
            case.check(linear(case))


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("kind", ["depthwise", "2d", "up grouped"])
@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        *[(variant, variant) for variant in ("late", "materialize", "unfold", "widen")],
        ("materialize", "kept"),
    ],
)
def test_convolutions(kind, forward, backward, norm):
    dtypes = NARROW[2:4] if forward == "widen" else [(dtype, dtype) for dtype in WIDE]
    for pair in dtypes:
        case = taken(case_of(KINDS, kind, 0, *pair), norm, clamps=kind == "2d")
        with planned(*convolution_plan(case, forward, backward)):
            case.check(case.layer)


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize(
    ("sizes", "dim", "options"),
    [
        ((2, 193, 37, (19,), (7,)), 0, {"padding": 3}),
        ((1, 300, 120, (9,), (40,)), 0, {"transposed": True, "groups": 3}),
        ((2, 96, 96, (49,), (40,)), 2, {"groups": 2, "padding": 20}),
    ],
    ids=["wide", "up grouped", "positions"],
)
def test_unfolded(sizes, dim, options, norm):
    """Weights longer than a segment, whose rows come in several chunks, and slices of columns."""
    case = taken(ConvCase(*sizes, dim, **options), norm)
    with planned("unfold", "unfold"):
        case.check(case.layer)


# --- the weight alone ----------------------------------------------------------------------------

# Rows, short and longer than a block; columns, of which the last have more than the caches hold; a
# few columns of each slice; and the whole.
WEIGHTS = [
    *[((9,), 0), ((40, 3, 3), 0), ((3, 4, 5, 2), 0), ((3, 9000), 0)],
    *[((300, 40), 1), ((7, 30, 17), 2), ((16, 2, 16), -3), ((5001, 33), 1), ((4300, 501), 1)],
    *[((70, 5, 4), 1), ((3, 4, 16, 3), -2), ((130, 7), None), ((3, 2, 70, 9), None)],
]


def weight(shape, dim, dtype, norm):
    """V, whose slices have ties, and g."""
    v = torch.randn(shape, dtype=torch.float64).clamp_(-1, 1)
    axis = None if dim is None else dim % len(shape)
    if axis is not None:
        v.movedim(axis, 0)[1::2] /= 2
        v.select(axis, -1).zero_()
    g = torch.rand(kept_shape(shape, axis), dtype=torch.float64) + 0.5
    return v.to(dtype).requires_grad_(), g.to(dtype).requires_grad_(), axis


def check_grads(dv, dg, dw, wide, right, axis, norm):
    """Compares with those of W in float64. dg is a sum of products, and dV a difference."""
    v, g = wide
    right_dv, right_dg = torch.autograd.grad(right, wide, dw.double())
    n = reference.norms(v, axis, 0.0, norm)
    terms = (reference.summed((dw.double() * v).abs(), axis) / n).norm().item()
    assert_matches(dg, right_dg, dg.dtype, v.numel(), terms=terms)
    size = (g / n * dw.double()).norm().item()
    if v.ndim > 1:
        assert_matches(dv, right_dv, dv.dtype, v.numel(), roundings=3, scale=size)


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize(("shape", "dim"), WEIGHTS)
@pytest.mark.parametrize("dtype", [*WIDE, *HALF])
def test_weight_norm(shape, dim, dtype, norm):
    v, g, axis = weight(shape, dim, dtype, norm)
    w = WF.weight_norm(v, g, dim=dim, norm=norm)
    wide = [t.detach().double().requires_grad_() for t in (v, g)]
    right = reference.weight_norm(*wide, axis, 0.0, norm)
    assert_matches(w, right, dtype, v.numel())
    dw = torch.randn(shape, dtype=dtype) + v.detach()
    dv, dg = torch.autograd.grad(w, (v, g), dw)
    check_grads(dv, dg, dw, wide, right, axis, norm)
    if axis is not None:
        for t in (w, dv, dg):
            assert_zero(t.select(axis, -1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_group(dtype):
    """Weights of all norms and layouts in one node, in V's dtype or another one."""
    every = [
        (*weight(shape, dim, torch.float32, norm), norm)
        for shape, dim in WEIGHTS[1:]
        for norm in ("l2", *OTHERS)
    ]
    v, g, axes, norms = map(list, zip(*every, strict=True))
    w = WF.weight_norms(v, g, dim=axes, norm=norms, dtype=dtype)
    dw = [(torch.randn(t.shape) + t.detach()).to(to.dtype) for t, to in zip(v, w, strict=True)]
    grads = torch.autograd.grad(w, v + g, dw)
    for i, (tensor, scale, axis, norm) in enumerate(every):
        wide = [t.detach().double().requires_grad_() for t in (tensor, scale)]
        right = reference.weight_norm(*wide, axis, 0.0, norm)
        assert_matches(w[i], right, w[i].dtype, tensor.numel())
        check_grads(grads[i], grads[len(v) + i], dw[i], wide, right, axis, norm)


# --- second derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("m", [1, 4])
def test_derivatives_of_linear(m, norm):
    case = Case(m, 6, 5, 0, torch.float64)
    case.norm = norm
    assert gradcheck(linear(case), case.leaves(), check_batched_grad=True)
    assert gradgradcheck(linear(case), case.leaves())


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize(("shape", "dim"), [((3, 4, 2), 0), ((3, 16), 1), ((3, 4, 4), None)])
def test_derivatives_of_weight_norm(shape, dim, norm):
    v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.rand(kept_shape(shape, dim), dtype=torch.float64, requires_grad=True)
    of_norm = functools.partial(WF.weight_norm, dim=dim, norm=norm)
    assert gradcheck(of_norm, (v, g))
    assert gradgradcheck(of_norm, (v, g))


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("clamps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "up", "positions"])
def test_second_derivatives_with_ties(kind, dtype, clamps, norm):
    """Those of a loss of the values and of all their gradients, beside the definition's."""
    if kind == "linear":
        case = Case(9, 48, 40, 0, dtype)
    elif kind == "positions":
        case = ConvCase(2, 16, 16, (30,), (16,), 2, dtype)
    else:
        case = case_of(KINDS, kind, 0, dtype)
    taken(case, norm, clamps)
    layer = linear(case) if kind == "linear" else case.layer
    conv = None if kind == "linear" else case.geometry()
    definition = functools.partial(
        reference.layer, conv=conv, dim=case.dim, eps=case.eps, norm=norm
    )

    def second(run, leaves, dy):
        y = run(*leaves)
        grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
        wide = torch.promote_types(y.dtype, torch.float32)
        loss = sum(t.to(wide).square().mean() for t in (y, *grads) if t.requires_grad)
        return torch.autograd.grad(loss, leaves[:3])

    found = second(layer, case.leaves(), case.dy)
    wide = [t.detach().double().requires_grad_() for t in case.leaves()]
    right = second(definition, wide, case.dy.double())
    for name, grad, expected in zip("xvg", found, right, strict=True):
        assert_matches(grad, expected, dtype, case.length, roundings=4, what=name)


# --- numbers out of the ordinary, and bits --------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", *OTHERS])
@pytest.mark.parametrize(("shape", "dim"), [((3, 9), 0), ((3, 5000), 0), ((70, 32), 1)])
@pytest.mark.parametrize("dtype", WIDE)
def test_a_nan_is_found_wherever_it_is(shape, dim, dtype, norm):
    """No maximum loses it: the library leaves the call alone, and W is NaN in that slice."""
    for at in (0, 1, shape[1 - dim] // 2, shape[1 - dim] - 1):
        v = torch.randn(shape).to(dtype)
        v.select(1 - dim, at)[1] = float("nan")
        g = torch.ones(kept_shape(shape, dim), dtype=dtype)
        with pytest.raises(RuntimeError, match="cannot serve"):
            WF.weight_norm(v, g, dim=dim, norm=norm)
        with use_backend("auto"):
            w = WF.weight_norm(v, g, dim=dim, norm=norm)
        assert w.select(dim, 1).isnan().all()
        assert not w.select(dim, 0).isnan().any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2], DTYPES[4]])
def test_same_bits_whatever_the_threads(dtypes, norm):
    """This holds for one row and for a few, with many ties and with few. The rows end within a
    vector."""
    shapes = [(1, 600, 500), (1, 1021, 300), (1, 70, 5000), (5, 619, 500)]
    shapes = [shape for shape in shapes if shape[0] == 1 or dtypes[1] == torch.float32]
    cases = [Case(*shape, 0, *dtypes) for shape in shapes]
    for case in cases:
        case.norm = norm
    cases += [taken(Case(*shape, 0, *dtypes), norm) for shape in shapes]
    shapes = [((501, 77), 0), ((5001, 33), 1), ((4300, 501), 1)]
    weights = [weight(*shape, dtypes[1], norm) for shape in shapes]
    weights.append((torch.randn(501, 333).to(dtypes[1]).requires_grad_(), weights[0][1], 0))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([])
            for case in cases:
                leaves = case.leaves()
                y = linear(case)(*leaves)
                found[-1] += [y, *torch.autograd.grad(y, leaves, case.dy)]
            for v, g, axis in weights:
                w = WF.weight_norm(v, g, dim=axis, norm=norm)
                dw = torch.cos(torch.arange(v.shape[1]) + v).detach().requires_grad_()
                grads = torch.autograd.grad(w, (v, g), dw, create_graph=True)
                found[-1] += [w, *grads, *torch.autograd.grad(grads, (dw, v, g), grads)]
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*found, strict=True):
        for other in others:
            assert_same_bits(one, other)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16])
def test_same_bits_wherever_a_row_ends(dtype, norm):
    """Zeros behind a row change no bit, so the last elements are computed as the others are."""
    for length in (77, 601, 619, 5003):
        v, dw, g = torch.randn(9, length), torch.randn(9, length), torch.rand(9, 1) + 0.5
        v[1].clamp_(-0.5, 0.5)  # which has ties in every group
        found = []
        for more in (0, 1, 64 - length % 64):
            tensors = [F.pad(t, (0, more)).to(dtype) for t in (v, dw)]
            leaves = [tensors[0].requires_grad_(), g.to(dtype).requires_grad_()]
            w = WF.weight_norm(*leaves, norm=norm)
            dv, dg = torch.autograd.grad(w, leaves, tensors[1])
            found.append((w[:, :length], dv[:, :length], dg))
        for one, *others in zip(*found, strict=True):
            for other in others:
                assert_same_bits(one, other)


def test_an_unknown_norm_is_named():
    case = Case(4, 6, 5, 0)
    for call in (
        lambda: WF.wn_linear(case.x, case.v, case.g, norm="l3"),
        lambda: WF.weight_norm(case.v, case.g, norm="l3"),
        lambda: WF.weight_norms([case.v], [case.g], norm="l3"),
    ):
        with pytest.raises(ValueError, match=r"norm must be one of .*, got 'l3'"):
            call()
    # A name is compared by its letters.
    name = "".join(["l", "inf"])
    assert_same_bits(
        WF.weight_norm(case.v, case.g, norm=name), WF.weight_norm(case.v, case.g, norm="linf")
    )
