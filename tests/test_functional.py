"""The public functions on the ATen path: values, dtypes, strides, and how they refuse bad input."""

import pytest
import torch

import wn_kernels.functional as WF
from tests.comparison import (
    DIMS,
    FLOATS,
    LAYOUTS,
    Case,
    assert_matches,
    assert_same_bits,
    assert_zero,
)
from tests.planning import planned
from wn_kernels import use_backend
from wn_kernels.backends import reference
from wn_kernels.call import NORMS, kept_shape

# Tiny, and on either side of where the variants change hands.
SHAPES = [(5, 37, 23), (32, 64, 64), (4, 512, 300), (300, 40, 200), (1, 1, 1), (3, 1, 7)]


@pytest.fixture(autouse=True)
def _aten():
    with use_backend("aten"):
        yield


def call(case):
    """`wn_linear` with gradients, checked; returns the output and the gradients."""
    options = {"dim": case.dim, "eps": case.eps, "norm": case.norm}
    return case.check(lambda *inputs: WF.wn_linear(*inputs, **options))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear(shape, dim, dtype):
    _, grads = call(Case(*shape, dim, dtype))
    assert all(grad.dtype == dtype for grad in grads)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("v_dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_mixed_dtypes(x_dtype, v_dtype, dim):
    _, grads = call(Case(6, 33, 20, dim, x_dtype, v_dtype))
    dtypes = [x_dtype, v_dtype, v_dtype, v_dtype]
    assert [grad.dtype for grad in grads] == dtypes


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 37, 23), (4, 512, 300)])
def test_strides(shape, layout, dim):
    call(Case(*shape, dim, layout=layout))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("eps", [0.0, 7.0])
@pytest.mark.parametrize("shape", [(9, 48, 33), (40, 300, 256)])
def test_eps_without_bias(shape, eps, dim):
    call(Case(*shape, dim, eps=eps, bias=False))


@pytest.mark.parametrize("variant", ["scaled", "materialize"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("keeps_product", [True, False])
def test_every_variant(variant, dim, keeps_product):
    """Whatever the planner picks is right."""
    with planned(variant, variant, "product" if keeps_product else ""):
        for m in (3, 40):
            call(Case(m, 300, 500, dim))
            call(Case(m, 300, 500, dim, eps=17.0))


@pytest.mark.parametrize("variant", ["scaled", "materialize"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_other_norms(norm, dim, variant):
    """With ties, a slice of norm zero, and norms that eps clamps."""
    dtypes = [torch.float32, torch.float64]
    if variant == "materialize":
        dtypes += [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        for eps in (0.0, {"l1": 30.0, "linf": 0.75}[norm]):
            for m, keeps in ((1, ""), (6, "product"), (40, "")):
                case = Case(m, 60, 50, dim, dtype, eps=eps)
                case.take(norm)
                with planned(variant, variant, keeps):
                    call(case)


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("dim", DIMS)
def test_leading_dimensions(leading, dim):
    case = Case(7, 12, 5, dim)
    x = torch.randn(*leading, 12, requires_grad=True)
    y = WF.wn_linear(x, case.v, case.g, case.bias, dim=dim)
    assert y.shape == (*leading, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    if x.numel():
        wide = [t.double() for t in (x, case.v, case.g, case.bias)]
        assert_matches(y, reference.linear(*wide, dim, 0.0), torch.float32, 12)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", [(0, 5, 4), (5, 0, 4), (5, 4, 0), (0, 0, 0)])
def test_sizes_of_zero(shape, dim):
    case = Case(*shape, dim)
    leaves = [t.requires_grad_() for t in (case.x, case.v, case.g, case.bias)]
    y = WF.wn_linear(*leaves, dim=dim)
    assert y.shape == (shape[0], shape[2])
    for leaf, grad in zip(leaves, torch.autograd.grad(y, leaves, case.dy), strict=True):
        assert grad.shape == leaf.shape
        assert torch.isfinite(grad).all()
    if y.numel():  # K = 0: an empty sum
        assert_same_bits(y, case.bias.expand(y.shape))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("mask", range(1, 16))
def test_only_the_gradients_asked_for(mask, dim):
    for shape in [(6, 33, 20), (4, 512, 300)]:
        case = Case(*shape, dim)
        inputs = (case.x, case.v, case.g, case.bias)
        needs = [bool(mask >> i & 1) for i in range(4)]
        leaves = [t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
        WF.wn_linear(*leaves, dim=dim).backward(case.dy)
        for leaf, need in zip(leaves, needs, strict=True):
            assert (leaf.grad is not None) == need
        full = Case(*shape, dim)
        full.grads = [g if n else None for g, n in zip(case.grads, needs, strict=True)]
        full.check_backward([leaf.grad for leaf in leaves])


@pytest.mark.parametrize("shape", [(9,), (6, 5), (6, 5, 4), (3, 4, 5, 2)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", NORMS)
def test_weight_norm(shape, dtype, norm):
    for dim in (*range(len(shape)), None):
        v = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
        g = (torch.rand(kept_shape(shape, dim)) + 0.5).to(dtype).requires_grad_()
        dw = torch.randn(shape, dtype=torch.float64).to(dtype)
        w = WF.weight_norm(v, g, dim=dim, norm=norm)
        wide = [t.detach().double().requires_grad_() for t in (v, g)]
        expected = reference.weight_norm(*wide, dim, 0.0, norm)
        assert w.dtype == dtype
        assert_matches(w, expected, dtype, v.numel())
        dv, dg = torch.autograd.grad(w, (v, g), dw)
        expected_dv, expected_dg = torch.autograd.grad(expected, wide, dw.double())
        terms = dw.double().norm().item()
        assert_matches(dg, expected_dg, dtype, v.numel(), terms=terms)
        if v.numel() > g.numel():
            scale = (reference.slice_scale(*wide, dim, 0.0, norm) * dw.double()).norm().item()
            assert_matches(dv, expected_dv, dtype, v.numel(), roundings=3, scale=scale)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, None])
def test_weight_norm_keeps_the_layout(dim):
    v = torch.randn(6, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    w = WF.weight_norm(v, torch.ones(kept_shape(v.shape, dim)), dim=dim)
    assert w.is_contiguous(memory_format=torch.channels_last)


def test_dim_as_in_torch():
    """-1 means the whole tensor, as in torch._weight_norm; -2 counts from the end."""
    v, g = torch.randn(6, 5), torch.rand(6, 1)
    whole = torch.tensor(2.0)
    assert_same_bits(WF.weight_norm(v, whole, dim=-1), WF.weight_norm(v, whole, dim=None))
    assert_same_bits(WF.weight_norm(v, g, dim=-2), WF.weight_norm(v, g, dim=0))
    expected = torch._weight_norm(v.double(), whole.double(), -1)
    assert_matches(WF.weight_norm(v, whole, dim=-1), expected, torch.float32, 30)


@pytest.mark.parametrize("dim", DIMS)
def test_flat_g(dim):
    """A 1-d g of the right length is accepted, and its gradient is 1-d."""
    case = Case(4, 6, 5, dim)
    flat = case.g.reshape(-1).requires_grad_()
    y = WF.wn_linear(case.x, case.v, flat, case.bias, dim=dim)
    case.check_forward(y)
    (grad,) = torch.autograd.grad(y, flat, case.dy)
    assert_matches(grad.view_as(case.g), case.grads[2], torch.float32, 30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_stays_in_range(dtype):
    """Squares beyond float16's 65504, and products that overflow unless the weight is scaled."""
    x = torch.full((10, 128), 30.0, dtype=dtype)
    v = torch.full((64, 128), 300.0, dtype=dtype)
    g = torch.ones(64, 1, dtype=dtype)
    y = WF.wn_linear(x, v, g)
    assert_matches(y, torch.full((10, 64), 30 * 128**0.5).double(), dtype, 128)
    # float32 v and g: tiny or huge v, weights of ordinary size.
    for factor in (1e-10, 1e10):
        y = WF.wn_linear(x, factor * torch.ones(64, 128), torch.ones(64, 1))
        assert_matches(y, torch.full((10, 64), 30 * 128**0.5).double(), dtype, 128)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", [(9, 20, 18), (4, 512, 300)])
def test_dead_slice(shape, dim):
    """A slice of norm zero has direction zero: zero weight, finite gradients, no dg, no dv."""
    case = Case(*shape, dim)
    dead = case.v if dim is None else case.v.select(dim, 3)
    dead.zero_()
    leaves = [t.requires_grad_() for t in (case.x, case.v, case.g, case.bias)]
    y = WF.wn_linear(*leaves, dim=dim)
    assert torch.isfinite(y).all()
    grads = torch.autograd.grad(y, leaves, case.dy)
    assert all(torch.isfinite(grad).all() for grad in grads)
    dv, dg = (t if dim is None else t.select(dim, 3) for t in grads[1:3])
    assert_zero(dv)
    assert_zero(dg)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", [(9, 20, 18), (4, 512, 300)])
def test_nan_is_not_hidden(shape, dim):
    case = Case(*shape, dim)
    case.v[2, 3] = float("nan")
    for eps in (0.0, 1e-3):
        assert torch.isnan(WF.wn_linear(case.x, case.v, case.g, dim=dim, eps=eps)).any()
        assert torch.isnan(WF.weight_norm(case.v, case.g, dim=dim, eps=eps)).any()


def test_deterministic():
    for shape in [(6, 33, 20), (4, 512, 300), (400, 256, 300)]:
        for dim in DIMS:
            (y, grads), (again, grads_again) = (call(Case(*shape, dim)) for _ in range(2))
            assert_same_bits(again, y)
            for a, b in zip(grads_again, grads, strict=True):
                assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The product in autocast's dtype; parameters, norms and gradients stay float32."""
    case = Case(6, 64, 48, 0)
    leaves = [t.requires_grad_() for t in (case.x, case.v, case.g, case.bias)]
    with torch.autocast("cpu", dtype=dtype):
        y = WF.wn_linear(*leaves)
    assert y.dtype == dtype
    assert_matches(y, case.y, dtype, 64, roundings=4)
    for grad in torch.autograd.grad(y, leaves, case.dy.to(dtype)):
        assert grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        assert WF.wn_linear(case.x.double(), case.v, case.g).dtype == torch.float64


# --- bad input -----------------------------------------------------------------------------------


def good():
    return {
        "input": torch.randn(3, 5),
        "v": torch.randn(4, 5),
        "g": torch.rand(4, 1),
        "bias": torch.randn(4),
    }


BAD = [
    ({"input": torch.randn(3, 6)}, ValueError, r"input of shape \(3, 6\).*v of shape \(4, 5\)"),
    ({"input": torch.tensor(1.0)}, ValueError, r"input of shape \(\).*last dimension.*5"),
    ({"v": torch.randn(4, 5, 1)}, ValueError, r"v must be 2-d.*\(4, 5, 1\)"),
    ({"v": torch.randn(5)}, ValueError, r"v must be 2-d.*\(5,\)"),
    ({"g": torch.rand(5)}, ValueError, r"g has shape \(5,\).*\(4, 5\).*dim=0.*\(4, 1\) or \(4,\)"),
    ({"g": torch.rand(1, 5)}, ValueError, r"g has shape \(1, 5\)"),
    ({"g": torch.rand(4, 1), "dim": 1}, ValueError, r"g has shape \(4, 1\).*dim=1.*\(1, 5\)"),
    ({"g": torch.rand(4, 1), "dim": None}, ValueError, r"g has shape \(4, 1\).*\(\) or \(1,\)"),
    ({"g": torch.tensor(1.0)}, ValueError, r"g has shape \(\)"),
    ({"bias": torch.randn(5)}, ValueError, r"bias has shape \(5,\).*\(4,\)"),
    ({"bias": torch.randn(1, 4)}, ValueError, r"bias has shape \(1, 4\)"),
    ({"dim": 2}, ValueError, r"dim=2 is out of range"),
    ({"dim": -3}, ValueError, r"dim=-3 is out of range"),
    ({"dim": 0.5}, TypeError, r"dim must be an int or None, got 0.5"),
    ({"dim": [0]}, TypeError, r"dim must be an int or None, got \[0\]"),
    ({"dim": True}, TypeError, r"dim must be an int or None, got True"),
    ({"eps": -1.0}, ValueError, r"eps must be finite and not negative, got -1.0"),
    ({"eps": float("nan")}, ValueError, r"eps must be finite"),
    ({"eps": float("inf")}, ValueError, r"eps must be finite"),
    ({"eps": 10**400}, ValueError, r"eps must be finite"),
    ({"eps": 1e39}, ValueError, r"eps must be at most 3.4e\+38, got 1e\+39"),
    ({"eps": "x"}, TypeError, r"eps must be a number, got 'x'"),
    ({"eps": "1"}, TypeError, r"eps must be a number, got '1'"),
    ({"norm": "l3"}, ValueError, r"norm must be one of \['l2', 'l1', 'linf'\], got 'l3'"),
    ({"norm": 2}, ValueError, r"norm must be one of .*, got 2"),
    ({"norm": ["l1"]}, ValueError, r"norm must be one of .*, got \['l1'\]"),
    ({"input": [[1.0]]}, TypeError, r"input must be a torch.Tensor, got list"),
    ({"g": None}, TypeError, r"g must be a torch.Tensor, got NoneType"),
    ({"bias": 1.0}, TypeError, r"bias must be a torch.Tensor, got float"),
    *(
        ({name: torch.ones(shape, dtype=dtype)}, TypeError, rf"{name} has dtype torch\.\w+")
        for name, shape in {"input": (3, 5), "v": (4, 5), "g": (4, 1), "bias": (4,)}.items()
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    *(
        ({name: torch.empty(shape, device="meta")}, ValueError, rf"one device.*{name} on meta")
        for name, shape in {"input": (3, 5), "v": (4, 5), "g": (4, 1), "bias": (4,)}.items()
    ),
    ({"input": torch.randn(3, 5).to_sparse()}, TypeError, r"input must be a dense.*sparse_coo"),
    ({"v": torch.randn(4, 5).to_sparse_csr()}, TypeError, r"v must be a dense.*sparse_csr"),
]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        WF.wn_linear(**(good() | change))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_to_weight_norm(change, error, message):
    arguments = {
        k: x for k, x in (good() | change).items() if k in ("v", "g", "dim", "eps", "norm")
    }
    if not change.keys() & arguments.keys() or "2-d" in message:
        return  # about arguments or ranks that wn_linear alone restricts
    message = message if "got NoneType" not in message else "g must be"
    with pytest.raises(error, match=message):
        WF.weight_norm(**arguments)


def test_nested_and_quantized():
    nested = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(1, 5)])
    with pytest.raises(TypeError, match=r"input must be a dense.*nested"):
        WF.wn_linear(**(good() | {"input": nested}))
    quantized = torch.quantize_per_tensor(torch.randn(4, 5), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"v has dtype torch\.qint8"):
        WF.wn_linear(**(good() | {"v": quantized}))


def test_reference_backend():
    case = Case(5, 12, 7, 0)
    with use_backend("reference"):
        call(case)
