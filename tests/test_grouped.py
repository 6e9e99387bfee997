"""`functional.weight_norms`: the weights of many layers in one call, on every backend."""

import pytest
import torch

import wn_kernels
import wn_kernels.functional as WF
from tests.comparison import assert_matches, strided
from wn_kernels.backends import native, reference
from wn_kernels.call import kept_shape

# Shape, dim, eps, the dtypes of V and of W, and the memory layout.
MEMBERS = [
    ((6, 5, 3), 0, 0.0, torch.float32, None, "contiguous"),
    ((40, 70), 0, 0.0, torch.float32, torch.bfloat16, "contiguous"),
    ((4, 6, 5), 1, 0.0, torch.float32, None, "transposed"),
    ((5, 4, 16), 2, 0.0, torch.float32, torch.float16, "contiguous"),
    ((7, 3, 2, 2), None, 0.0, torch.float32, None, "contiguous"),
    ((3, 8, 4), 0, 5.0, torch.float32, None, "contiguous"),
    ((9,), 0, 0.0, torch.float32, None, "contiguous"),
    ((5, 2, 2, 3), 0, 0.0, torch.float32, None, "channels-last"),
    ((5, 6, 7), 1, 0.0, torch.float32, None, "sliced"),
    ((300, 2), 0, 0.0, torch.float32, None, "contiguous"),
]
OTHERS = [
    ((6, 5, 3), 0, 0.0, torch.float32, None, "contiguous", "l1"),
    ((40, 70), 0, 0.0, torch.bfloat16, None, "contiguous", "linf"),
    ((4, 6, 5), 1, 0.0, torch.float32, None, "transposed", "linf"),
    ((7, 3, 2, 2), None, 0.0, torch.float32, None, "contiguous", "l1"),
    ((3, 8, 4), 0, 2.0, torch.float32, None, "contiguous", "linf"),
    ((5, 4), 0, 0.0, torch.float32, None, "contiguous", "l2"),
]
ROWS = [member for member in MEMBERS if member[1] == 0 and member[-1] != "sliced"]
HALF = [
    ((6, 5, 3), 0, 0.0, torch.bfloat16, None, "contiguous"),
    ((8, 33), 0, 0.0, torch.float16, torch.float32, "contiguous"),
    ((4, 6, 5), 1, 0.0, torch.float64, None, "contiguous"),
]
BACKENDS = ["auto", "aten", "triton", "reference"]


def tensors(members, device="cpu"):
    """`(v, g, dw)`, lists of leaves and of gradients."""
    lists = [], [], []
    for shape, dim, _, dtype, of_w, layout, *_ in members:
        v = strided(torch.randn(shape, dtype=torch.float64), layout).to(dtype)
        g = (torch.rand(kept_shape(shape, dim), dtype=torch.float64) + 0.5).to(dtype)
        dw = torch.randn(shape, dtype=torch.float64).to(of_w or dtype)
        for each, t in zip(lists, (v, g, dw), strict=True):
            each.append(t.to(device))
    for t in (*lists[0], *lists[1]):
        t.requires_grad_()
    return lists


def options(members):
    return {
        "dim": [m[1] for m in members],
        "eps": [m[2] for m in members],
        "dtype": [m[4] for m in members],
        "norm": [norm_of(m) for m in members],
    }


def norm_of(member):
    return member[6] if len(member) > 6 else "l2"


def check(members, v, g, dw, w, grads):
    for i, (_, dim, eps, dtype, of_w, *_) in enumerate(members):
        wide = [t.detach().double().cpu().requires_grad_() for t in (v[i], g[i])]
        norm = norm_of(members[i])
        expected = reference.weight_norm(*wide, dim, eps, norm)
        expected_grads = torch.autograd.grad(expected, wide, dw[i].double().cpu())
        length = v[i].numel()
        assert w[i].dtype == (of_w or dtype)
        assert w[i].stride() == torch.empty_like(v[i]).stride()
        assert_matches(w[i], expected, w[i].dtype, length, what=f"w {i}")
        dv, dg = grads[i], grads[len(v) + i]
        assert (dv.dtype, dg.dtype) == (dtype, dtype)
        terms = dw[i].double().norm().item()
        if v[i].numel() > g[i].numel() or eps:
            scale = expected.norm().item() / wide[0].norm().item() * terms
            roundings = {"roundings": 3, "scale": 4 * scale}
            assert_matches(dv, expected_grads[0], dtype, length, **roundings, what=f"dv {i}")
        assert_matches(dg, expected_grads[1], dtype, length, terms=terms, what=f"dg {i}")


@pytest.mark.parametrize(
    "members", [MEMBERS, HALF, MEMBERS[:1], OTHERS], ids=["mixed", "half", "one", "norms"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, members, device):
    v, g, dw = tensors(members, device if backend == "triton" else "cpu")
    with wn_kernels.use_backend(backend):
        w = WF.weight_norms(v, g, **options(members))
    grads = torch.autograd.grad(w, [*v, *g], dw)
    check(members, v, g, dw, w, grads)
    assert len({t.untyped_storage().data_ptr() for t in w}) == len(w)


def test_the_native_library_serves_rows():
    native.build()
    v, g, dw = tensors(ROWS)
    with wn_kernels.use_backend("native"):
        w = WF.weight_norms(v, g, **options(ROWS))
    assert len({t.grad_fn for t in w}) == 1
    grads = torch.autograd.grad(w, [*v, *g], dw)
    check(ROWS, v, g, dw, w, grads)


@pytest.mark.parametrize("backend", ["auto", "aten", "triton"])
def test_double_backward(backend, device):
    """Through the closed formula, with a weight that has no gradient."""
    chosen = *(MEMBERS[i] for i in (0, 2, 4)), *OTHERS[:3], MEMBERS[0]
    members = [(*m[:3], torch.float64, None, m[5], norm_of(m)) for m in chosen]
    v, g, _ = tensors(members, device if backend == "triton" else "cpu")

    def grads(*leaves):
        count = len(members)
        given = {"dim": [m[1] for m in members], "norm": [norm_of(m) for m in members]}
        w = WF.weight_norms(leaves[:count], leaves[count:], **given)
        total = sum(t.pow(3).sum() for t in w[:-1])
        return torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)

    with wn_kernels.use_backend(backend):
        found = [t for t in grads(*v, *g) if t is not None]
        assert len(found) == 2 * (len(members) - 1)
        second = torch.autograd.grad(sum(t.sin().sum() for t in found), [*v, *g], allow_unused=True)
    with wn_kernels.use_backend("reference"):
        found = [t for t in grads(*v, *g) if t is not None]
        right = torch.autograd.grad(sum(t.sin().sum() for t in found), [*v, *g], allow_unused=True)
    for a, b in zip(second, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_matches(a, b, torch.float64, 1024, roundings=64)


def test_transforms():
    v, g, dw = tensors(MEMBERS[:2])
    v, g = [t.detach().double() for t in v], [t.detach().double() for t in g]
    w, tangents = torch.func.jvp(lambda *v: WF.weight_norms(v, g), tuple(v), tuple(dw))
    _, pull = torch.func.vjp(lambda *v: WF.weight_norms(v, g), *v)
    back = pull([t.double() for t in dw])
    left = sum((t * d).sum() for t, d in zip(tangents, dw, strict=True))
    right = sum((t * d).sum() for t, d in zip(back, dw, strict=True))
    assert_matches(left, right, torch.float64, 4096, roundings=64)
    assert_matches(w[0], reference.weight_norm(v[0], g[0], 0, 0.0), torch.float64, 64)


def test_the_operator():
    v, g, _ = tensors(MEMBERS[:3])
    for norms in ([0, 0, 0], [0, 1, 2]):
        arguments = "aten", [m[1] for m in MEMBERS[:3]], [0.0] * 3, norms, [2, 1, 2]
        torch.library.opcheck(torch.ops.wn_kernels.weight_norms.default, (v, g, *arguments))


def test_norms_out_of_range():
    """All weights are then computed in float64."""
    v, g = [torch.full((2, 3), 1e-25), torch.randn(4, 5)], [torch.ones(2, 1), torch.ones(4, 1)]
    for backend in ("auto", "aten"):
        with wn_kernels.use_backend(backend):
            w = WF.weight_norms(v, g)
        for t, a, b in zip(w, v, g, strict=True):
            right = reference.weight_norm(a.double(), b.double(), 0, 0.0)
            assert_matches(t, right, torch.float32, 8)


def test_dead_slices_and_nothing():
    assert WF.weight_norms([], []) == []
    v = [torch.randn(3, 4), torch.randn(0, 4), torch.zeros(2, 3)]
    g = [torch.ones(3, 1), torch.ones(0, 1), torch.ones(2, 1)]
    for backend in ("auto", "aten", "reference"):
        with wn_kernels.use_backend(backend):
            w = WF.weight_norms(v, g)
        assert w[1].shape == (0, 4)
        assert not w[2].any()
        assert_matches(w[0].norm(dim=1), torch.ones(3, dtype=torch.float64), torch.float32, 4)


def test_what_was_wrong():
    v, g = [torch.randn(3, 4)] * 2, [torch.ones(3, 1)] * 2
    with pytest.raises(TypeError, match="v must be a list of tensors, got NoneType"):
        WF.weight_norms(None, None)
    with pytest.raises(TypeError, match="g must be a list of tensors, got Tensor"):
        WF.weight_norms([torch.ones(2, 2)], torch.ones(2, 1))
    with pytest.raises(TypeError, match="weight 0: its place is no tensor, but NoneType"):
        WF.weight_norms([torch.ones(2, 2)], [torch.ones(2, 1)], places=[None])
    with pytest.raises(ValueError, match="v has 2 tensors, but g has 1"):
        WF.weight_norms(v, g[:1])
    with pytest.raises(ValueError, match="dim has 1 values"):
        WF.weight_norms(v, g, dim=[0])
    with pytest.raises(ValueError, match="weight 1: g has shape"):
        WF.weight_norms(v, [g[0], torch.ones(4)])
    with pytest.raises(ValueError, match="weight 1: dim=2 is out of range"):
        WF.weight_norms(v, g, dim=[0, 2])
    with pytest.raises(TypeError, match=r"weight 0: dtype is torch\.int32"):
        WF.weight_norms(v, g, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"weight 1: v has dtype torch\.int64"):
        WF.weight_norms([v[0], torch.ones(3, 4, dtype=torch.int64)], g)
    with pytest.raises(ValueError, match="weight 1: v is on meta"):
        WF.weight_norms([v[0], v[0].to("meta")], [g[0], g[0].to("meta")])
