"""The kernels of scaled weights and their gradients, for slices along any dimension."""

import pytest
import torch

from tests.comparison import (
    assert_matches,
    assert_same_bits,
    strided,
)
from wn_kernels.backends import reference
from wn_kernels.backends.triton import configs, slice_norms, weight_norm, weight_norm_backward
from wn_kernels.backends.triton.launch import recording, target_of
from wn_kernels.backends.triton.weight import prepare_weight_norm, remembered_weight_norm
from wn_kernels.call import kept_shape

SMALL = configs.SliceConfig(4, 4, 8, 4)

# Each form of a slice's sum, with a configuration and a number of splits that lead to it.
FORMS = {"held": (None, 1), "walked": (SMALL, 1), "partial": (SMALL, 3)}

SHAPES = [
    ((9,), 0),
    ((13, 37), 0),
    ((13, 37), 1),
    ((13, 37), None),
    ((37,), None),
    ((11, 5, 9), 0),
    ((11, 5, 9), 1),
    ((11, 5, 9), 2),
    ((11, 5, 9), None),
    ((3, 4, 5, 7), 1),
    ((3, 4, 5, 7), 2),
    ((1, 1, 40), 0),
    ((1, 40), 1),
]


def inputs(shape, dim, dtype, device, g_dtype=None):
    v = torch.randn(shape, dtype=torch.float64).to(dtype)
    g = (torch.rand(kept_shape(shape, dim), dtype=torch.float64) + 0.5).to(g_dtype or dtype)
    dw = torch.randn(shape, dtype=torch.float64).to(dtype)
    return v.to(device), g.to(device), dw.to(device)


def check(v, g, dw, dim, *, eps=0.0, norm="l2", config=SMALL, splits=None, dtype=None):
    """Forward and backward against the reference in float64."""
    dtype = dtype or v.dtype
    wide = [t.detach().double().requires_grad_() for t in (v, g)]
    expected = reference.weight_norm(*wide, dim, eps, norm)
    expected_dv, expected_dg = torch.autograd.grad(expected, wide, dw.double())
    options = {"norm": norm, "config": config, "splits": splits}
    w, n = weight_norm(v, g, dim, eps, dtype, **options)
    dv, dg = weight_norm_backward(dw, v, g, n, dim, eps, **options)

    length = v.numel()
    assert w.dtype == dtype
    assert dv.dtype == v.dtype
    assert dg.dtype == g.dtype
    assert_matches(w, expected, dtype, length, what="w")
    terms = dw.double().norm().item()
    scale = (reference.slice_scale(*wide, dim, eps, norm) * dw.double()).norm().item()
    if v.numel() == n.numel():  # slices of one element: no direction to learn
        assert dv.double().norm().item() <= 8 * torch.finfo(v.dtype).eps * scale
    else:
        assert_matches(dv, expected_dv, v.dtype, length, roundings=3, scale=scale, what="dv")
    assert_matches(dg, expected_dg, g.dtype, length, terms=terms, what="dg")
    return w, dv


@pytest.mark.sanitize
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_every_dim(shape, dim, form, device):
    config, splits = FORMS[form]
    check(*inputs(shape, dim, torch.float32, device), dim, config=config, splits=splits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "dim"), [((13, 37), 0), ((13, 37), 1), ((11, 5, 9), 1)])
def test_dtypes(shape, dim, dtype, form, device):
    config, splits = FORMS[form]
    check(*inputs(shape, dim, dtype, device), dim, config=config, splits=splits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_mixed_dtypes(dim, form, device):
    config, splits = FORMS[form]
    v, g, dw = inputs((13, 37), dim, torch.float32, device, g_dtype=torch.bfloat16)
    check(v, g, dw.bfloat16(), dim, dtype=torch.bfloat16, config=config, splits=splits)
    v, g, dw = inputs((13, 37), dim, torch.bfloat16, device, g_dtype=torch.float32)
    check(v, g, dw.float(), dim, dtype=torch.float32, config=config, splits=splits)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
@pytest.mark.parametrize(("shape", "dim"), SHAPES[1:11])
def test_strides(shape, dim, layout, device):
    v, g, dw = inputs(shape, dim, torch.float32, device)
    v = strided(v, layout)
    w, dv = check(v, g, dw, dim)
    assert w.stride() == torch.empty_like(v).stride()
    assert dv.stride() == torch.empty_like(v).stride()
    check(v, g, strided(dw, "transposed"), dim)


@pytest.mark.sanitize
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [0, 1, 2, 3, None])
def test_channels_last(dim, form, device):
    """One of V and dW, or both. The results have V's layout."""
    config, splits = FORMS[form]
    v, g, dw = inputs((6, 5, 3, 4), dim, torch.float32, device)
    last = torch.channels_last
    v_last, dw_last = (t.contiguous(memory_format=last) for t in (v, dw))
    for of_v, of_dw in ((v, dw_last), (v_last, dw), (v_last, dw_last)):
        w, dv = check(of_v, g, of_dw, dim, config=config, splits=splits)
        assert w.stride() == dv.stride() == of_v.stride()


@pytest.mark.parametrize("form", FORMS)
def test_packed_weight(form, device):
    """W with its channels contiguous, whatever V's layout is."""
    config, splits = FORMS[form]
    v, g, _ = inputs((6, 5, 3, 4), 0, torch.float32, device)
    options = (0, 0.0, "l2", torch.bfloat16, config, splits, True)
    w, _ = remembered_weight_norm(target_of(v), (v, g), *options)(v, g)
    assert w.stride(1) == 1
    expected = reference.weight_norm(v.double(), g.double(), 0, 0.0)
    assert_matches(w, expected, torch.bfloat16, v.numel())


@pytest.mark.sanitize
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "dim"), [((13, 37), 0), ((13, 37), 1), ((13, 37), None), ((11, 5, 9), 2)]
)
@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_other_norms(norm, shape, dim, form, device):
    """Most slices have several elements of the largest magnitude, of either sign, in parts that
    several programs share. One slice is zero."""
    config, splits = FORMS[form]
    v, g, dw = inputs(shape, dim, torch.float32, device)
    v.clamp_(-1.0, 1.0)
    if dim is not None:
        v.select(dim, 2).zero_()
    check(v, g, dw, dim, norm=norm, config=config, splits=splits)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_dtypes_of_other_norms(norm, dtype, splits, device):
    """Ties, and eps between the norms of the slices."""
    v, g, dw = inputs((13, 37), 0, dtype, device, g_dtype=torch.float32)
    v.clamp_(-1.0, 1.0)[1::2] /= 2
    eps = {"l1": 18.0, "linf": 0.75}[norm]
    check(v, g, dw, 0, eps=eps, norm=norm, splits=splits)


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "dim", "dtype", "form", "programs"),
    [
        ((4096, 4096), 0, BF16, "held", 4096),
        ((1024, 1024), 0, torch.float32, "held", 512),
        ((512, 256, 16), 0, torch.float32, "held", 512),
        ((64, 64), 0, BF16, "held", 64),
        ((512, 512, 3, 3), 0, BF16, "held", 512),
        ((128, 8193), 0, BF16, "walked", 128),  # which a tile of twice its size would hold
        ((600, 40000), 0, BF16, "walked", 600),
        ((64, 512, 512), 0, torch.float16, "partial", 2048),
        ((1024, 1024, 1024), 0, torch.float32, "partial", 16384),
        ((4096, 4096), 1, BF16, "partial", 1024),
        ((768, 48, 128), 2, torch.float32, "partial", 232),
        ((16, 4096), 1, BF16, "held", 256),
        ((4096, 4096), None, BF16, "partial", 1024),
    ],
)
def test_how_slices_are_shared(shape, dim, dtype, form, programs):
    """By the programs of a GPU with 132 multiprocessors, in both directions."""
    v = torch.empty(shape, dtype=dtype, device="meta")
    g = torch.empty(kept_shape(shape, dim), dtype=dtype, device="meta")
    with recording() as launches:
        weight_norm(v, g, dim, 0.0, dtype)
        weight_norm_backward(v, v, g, g.float(), dim, 0.0)
    assert len(launches) == (4 if form == "partial" else 2)
    for launch in launches:
        assert launch.arguments.get("FORM", form) == form
        assert launch.grid[0] * launch.grid[1] == programs


def test_expanded_gradient(device):
    v, g, _ = inputs((11, 5, 9), 1, torch.float32, device)
    check(v, g, torch.ones((), device=device).expand(v.shape), 1)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("splits", [1, 3])
def test_eps(dim, splits, device):
    """Between two norms, where no rounding of theirs decides."""
    v, g, dw = inputs((13, 37), dim, torch.float32, device)
    n = slice_norms(v, dim, 0.0).flatten().sort().values
    middle = len(n) // 2
    eps = 1.01 * n if dim is None else (n[middle] + n[middle + 1]) / 2
    check(v, g, dw, dim, eps=eps.item(), splits=splits)


@pytest.mark.sanitize
@pytest.mark.parametrize("form", FORMS)
def test_norms_at_the_address_zero(form, device):
    """They are not written, which serves a call without gradients. An empty tensor is there."""
    v, g, _ = inputs((13, 37), 0, torch.float32, device)
    run = prepare_weight_norm(target_of(v), v, g, 0, 0.0, "l2", v.dtype, *FORMS[form])
    held = [v, g]
    for i, (shape, strides, dtype) in enumerate(run.layouts, run.arguments):
        absent = i in run.spare
        held.append(v.new_empty(0) if absent else v.new_empty_strided(shape, strides, dtype=dtype))
    for launch, given, _ in run.steps:
        launch(*[held[i] for i in given])
    w, n = (held[i] for i in run.results)
    assert not n.numel()
    # Where PARTIAL is not read, it is NORMS.
    assert sum(i in run.spare for i in given) == (1 if form == "partial" else 2)
    assert_matches(w, reference.weight_norm(v.double(), g.double(), 0, 0.0), v.dtype, 37, what="w")


def test_deterministic(device):
    v, g, dw = inputs((2, 9000), 0, torch.float32, device)
    _, n = weight_norm(v, g, 0, 0.0, v.dtype)
    first, second = (weight_norm_backward(dw, v, g, n, 0, 0.0) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
