"""Triton's calls as nodes, of the native library and without it: passes, the functions that they
fall back to, and what surrounds them."""

import copy
import functools
import gc
import itertools
import weakref

import pytest
import torch

pytest.importorskip("triton")

import wn_kernels.functional as WF
from tests import library
from tests.comparison import Case, ConvCase, assert_matches, assert_same_bits
from wn_kernels import operators, plan, prepare, use_backend
from wn_kernels.backends import native, reference, vendor
from wn_kernels.backends.triton import launch
from wn_kernels.call import fits_unscaled

HALF = torch.bfloat16
CASES = {
    "linear, one pass": Case(4, 20, 12, 0),
    "linear, inputs": Case(10, 24, 12, 1),
    "linear, whole": Case(9, 24, 12, None),
    "linear, wide weight": Case(5, 24, 12, 0, HALF, torch.float32),
    "1d": ConvCase(2, 6, 8, (9,), (3,), 0),
    "1d, wide weight": ConvCase(2, 6, 8, (9,), (3,), 0, HALF, torch.float32),
    "2d": ConvCase(2, 6, 8, (7, 5), (3, 3), 0),
    "2d, channels last": ConvCase(2, 8, 6, (7, 5), (3, 3), 0, layout="channels-last"),
    "3d": ConvCase(1, 3, 4, (4, 4, 4), (2, 2, 2), 0),
    "up": ConvCase(2, 6, 8, (9,), (4,), 0, transposed=True, stride=2),
}


@pytest.fixture(autouse=True, params=["library", "python"])
def way(request, monkeypatch):
    """Every call is a node, of the library or without it: the way of all other calls is closed."""
    native.build()
    launch.forget()
    if request.param == "python":
        library.hide(monkeypatch)

    def closed(*_):
        raise AssertionError("no node served the call")

    monkeypatch.setattr(operators, "layer", closed)
    with use_backend("triton"):
        yield
    launch.forget()


def no_functions(monkeypatch):
    """Leaves passes alone."""

    def closed(*_):
        raise AssertionError("a function of Python served a direction")

    monkeypatch.setattr(operators, "_run", closed)
    monkeypatch.setattr(operators, "_run_backward", closed)


@pytest.fixture
def planned(monkeypatch):
    """A function that has every layer planned so."""
    real = plan.choose

    def plans(forward, backward, keeps=""):
        def choose(call, backend):
            if not call.x_shape or backend != "triton":
                return real(call, backend)
            return plan.Plan(backend, forward, backward, keeps)

        monkeypatch.setattr(plan, "choose", choose)
        prepare.forget()

    yield plans
    monkeypatch.undo()
    prepare.forget()


def layer(name):
    """Ours, of the case."""
    case = CASES[name]
    if isinstance(case, ConvCase):
        return case.layer
    return functools.partial(WF.wn_linear, dim=case.dim, eps=case.eps)


@pytest.mark.parametrize("name", CASES)
def test_as_planned(name):
    """The plan of the cost model: values and gradients."""
    CASES[name].check(layer(name))


@pytest.mark.parametrize("keeps", ["", "weight"])
@pytest.mark.parametrize("name", CASES)
def test_formed_weight(name, keeps, planned, monkeypatch):
    """`W` by a pass, then PyTorch's product, in both directions: no function of Python runs."""
    planned("materialize", "materialize", keeps)
    no_functions(monkeypatch)
    CASES[name].check(layer(name))


@pytest.mark.parametrize("name", [name for name in CASES if name[0] != "l" and name != "3d"])
@pytest.mark.parametrize(
    "plan",
    [("packed", "packed", ""), ("packed", "packed", "packed"), ("packed", "weight_grad", "")],
)
def test_convolutions(name, plan, planned, monkeypatch):
    """Passes alone, with PyTorch's gradient of the input and its sums in them. A packed `W` that is
    kept is formed once."""
    planned(*plan)
    no_functions(monkeypatch)
    case = CASES[name]
    case.check(layer(name))
    leaves = [t.detach().requires_grad_() for t in (case.x, case.v, case.g, case.bias)]
    with launch.recording() as launches:
        torch.autograd.backward(layer(name)(*leaves), case.dy)
    formed = [each for each in launches if each.kernel.__name__ == "weight_kernel"]
    assert len(formed) == (1 if plan[2] else 2)


@pytest.mark.parametrize("name", [name for name in CASES if name[0] == "l"])
@pytest.mark.parametrize("variant", ["one_pass", "scaled", "materialize"])
def test_linear(name, variant, planned, monkeypatch):
    """Passes alone, with PyTorch's products in them, in both directions, whatever the forward is
    paired with."""
    case = CASES[name]
    if variant == "scaled" and not fits_unscaled(case.x.dtype, case.v.dtype):
        variant = "one_pass"  # the planner never scales such a product late
    owns = {0: ("one_pass", "one_pass"), 1: ("scaled", "one_pass"), None: ("scaled", "scaled")}
    planned(*(owns[case.dim] if variant == "one_pass" else (variant, variant)))
    no_functions(monkeypatch)
    case.check(layer(name))


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("linear, one pass", "one_pass"),
        ("linear, one pass", "scaled"),
        ("linear, wide weight", "one_pass"),  # which is never scaled late
    ],
)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_kept_product(name, forward, norm, planned, monkeypatch):
    """The backward takes it from the node, with the ties of linf, and reads `V` once."""
    case = copy.deepcopy(CASES[name])
    if norm != "l2":
        case.take(norm)
    run = functools.partial(WF.wn_linear, norm=norm)
    planned(forward, "product", "product")
    no_functions(monkeypatch)
    case.check(run)
    leaves = case.leaves()
    with launch.recording() as launches:
        torch.autograd.backward(run(*leaves), case.dy)
    names = [each.kernel.__name__ for each in launches]
    assert names[-2:] == ["scale_kernel", "grads_kernel"]


@pytest.mark.parametrize("plan", [("one_pass", "one_pass"), ("one_pass", "product", "product")])
@pytest.mark.parametrize("shape", [(20,), (2, 3, 20), (0, 20)])
def test_rows(shape, plan, planned, monkeypatch):
    """`x` of any number of dimensions, and without a row."""
    planned(*plan)
    no_functions(monkeypatch)
    case = Case(6, 20, 12, 0)
    x = torch.randn(shape, requires_grad=True)
    leaves = [t.detach().requires_grad_() for t in (case.v, case.g, case.bias)]
    y = WF.wn_linear(x, *leaves)
    wide = [t.detach().double().requires_grad_() for t in (x, *leaves)]
    w = reference.weight_norm(*wide[1:3], 0, 0.0)
    expected = torch.nn.functional.linear(wide[0], w, wide[3])
    dy = torch.randn_like(y)
    found = y, *torch.autograd.grad(y, [x, *leaves], dy)
    right = expected, *torch.autograd.grad(expected, wide, dy.double())
    for t, other in zip(found, right, strict=True):
        assert t.shape == other.shape
        if other.numel() and other.abs().max() > 0:
            assert_matches(t, other, torch.float32, 240, terms=10 * other.norm().item())


def weight():
    v, g = torch.randn(6, 5), torch.rand(6, 1) + 0.5
    return v.requires_grad_(), g.requires_grad_()


def test_layouts_of_the_gradient(monkeypatch):
    """Each has its own pass, and the ninth is right as well."""
    v, g = weight()
    w = WF.weight_norm(v, g)
    right = reference.weight_norm(v.double(), g.double(), 0, 0.0)
    for i in range(1, 12):
        dw = torch.randn(6, 5 * i)[:, ::i]
        found = torch.autograd.grad(w, (v, g), dw, retain_graph=True)
        expected = torch.autograd.grad(right, (v, g), dw.double(), retain_graph=True)
        for grad, other in zip(found, expected, strict=True):
            assert_matches(grad, other.double(), torch.float32, 30, terms=20.0)


@pytest.mark.parametrize(
    ("name", "keeps"),
    [
        ("linear, one pass", "product"),
        *itertools.product(["linear, one pass", "1d", "up"], [None, "", "weight"]),
    ],
)
def test_gradients_that_are_wanted(name, keeps, planned):
    """Every choice of them, by the plan of the cost model, with a formed `W`, and with a kept
    product."""
    if keeps == "product":
        planned("one_pass", "product", keeps)
    elif keeps is not None:
        planned("materialize", "materialize", keeps)
    case = CASES[name]
    for chosen in itertools.product((False, True), repeat=4):
        if not any(chosen):
            continue
        tensors = (case.x, case.v, case.g, case.bias)
        leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, chosen, strict=True)]
        y = layer(name)(*leaves)
        case.check_forward(y)
        y.backward(case.dy)
        for t, want, expected in zip(leaves, chosen, case.grads, strict=True):
            assert (t.grad is not None) == want
            if want:
                scale = case.terms["dv"]
                assert_matches(t.grad, expected, torch.float32, case.length, terms=scale)


def test_hooks_on_saved_tensors():
    """Each operand and the norms pass through them, and come back."""
    v, g = weight()
    x, dy = torch.randn(3, 5, requires_grad=True), torch.randn(3, 6)
    right = torch.autograd.grad(WF.wn_linear(x, v, g), (x, v, g), dy)
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = WF.wn_linear(x, v, g)
    assert packed == [(3, 5), (6, 5), (6, 1), (6, 1)]
    for a, b in zip(torch.autograd.grad(y, (x, v, g), dy), right, strict=True):
        assert_same_bits(a, b)


def test_second_order():
    """The tensors are small, because each of their elements takes many launches."""
    x, v, g = (
        t.double().requires_grad_()
        for t in (torch.randn(2, 2), torch.randn(3, 2), torch.ones(3, 1))
    )
    assert torch.autograd.gradgradcheck(lambda v, g: WF.weight_norm(v, g), (v, g))
    assert torch.autograd.gradgradcheck(lambda *t: WF.wn_linear(*t), (x, v, g))


def second(run, leaves, dy):
    """The gradients of a loss of all the gradients of the first order."""
    grads = torch.autograd.grad(run(*leaves), leaves, dy, create_graph=True)
    return torch.autograd.grad(sum(t.square().mean() for t in grads), leaves, allow_unused=True)


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("name", ["linear, one pass", "1d"])
def test_other_norms(name, norm):
    """A node hands the norm on to all that it calls, in both directions and in the second order."""
    case = copy.deepcopy(CASES[name])
    case.take(norm)
    options = {"dim": case.dim, "eps": case.eps, "norm": norm}
    is_linear = isinstance(case, Case)
    run = functools.partial(WF.wn_linear, **options) if is_linear else case.layer
    case.check(run)
    conv = None if is_linear else case.geometry()
    definition = functools.partial(reference.layer, conv=conv, **options)
    wide = [t.detach().double().requires_grad_() for t in case.leaves()]
    found, right = (
        second(run, case.leaves(), case.dy)[:3],
        second(definition, wide, case.dy.double())[:3],
    )
    for what, grad, expected in zip("xvg", found, right, strict=True):
        assert_matches(grad, expected, torch.float32, case.length, roundings=4, what=what)


def test_a_group_of_norms():
    norms = ["l2", "l1", "linf"]
    v, g = zip(*(weight() for _ in norms), strict=True)
    wide = [t.detach().double().requires_grad_() for t in (*v, *g)]
    dw = [torch.randn(6, 5) for _ in norms]
    run = functools.partial(WF.weight_norms, norm=norms)

    def of_group(*leaves):
        return run(leaves[:3], leaves[3:])

    def definition(*leaves):
        pairs = zip(leaves[:3], leaves[3:], norms, strict=True)
        return [reference.weight_norm(a, b, 0, 0.0, norm) for a, b, norm in pairs]

    found = second(of_group, [*v, *g], dw)
    right = second(definition, wide, [t.double() for t in dw])
    for grad, expected in zip(found, right, strict=True):
        assert_matches(grad, expected, torch.float32, 30, roundings=4)


def test_the_graph_is_kept_or_freed():
    v, g = weight()
    w, dw = WF.weight_norm(v, g), torch.randn(6, 5)
    first = torch.autograd.grad(w, (v, g), dw, retain_graph=True)
    second = torch.autograd.grad(w, (v, g), dw)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(w, (v, g), dw)
    w = WF.weight_norm(v, g)
    with torch.no_grad():
        v.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        w.backward(dw)


@pytest.mark.parametrize("kernel", ["weight_kernel", "weight_grad_kernel"])
def test_an_error_of_a_launch_surfaces(kernel, monkeypatch):
    """In the forward and in the backward; the next call is right."""
    v, g = weight()
    real = launch.Launcher.__call__

    def fails(self, *tensors):
        if self.kernel.__name__ == kernel:
            raise ZeroDivisionError(kernel)
        return real(self, *tensors)

    with monkeypatch.context() as patch:
        patch.setattr(launch.Launcher, "__call__", fails)
        with pytest.raises(ZeroDivisionError, match=kernel):
            WF.weight_norm(v, g).backward(torch.ones(6, 5))
    WF.weight_norm(v, g).backward(torch.ones(6, 5))
    assert v.grad.isfinite().all()


def test_recorded_launches():
    """`recording` sees both directions, and nothing runs."""
    v, g = weight()
    with launch.recording() as launches:
        WF.weight_norm(v, g).backward(torch.ones(6, 5))
    names = [each.kernel.__name__ for each in launches]
    assert names == ["weight_kernel", "weight_grad_kernel"]


def test_where_the_vendor_s_product_is_wrong(monkeypatch):
    """Python serves the call, and widens it."""
    monkeypatch.setattr(vendor, "WRONG_IN_3D", frozenset((HALF,)))
    case = ConvCase(1, 3, 4, (4, 4, 4), (2, 2, 2), 0, HALF)
    with pytest.raises(AssertionError, match="no node served"), torch.no_grad():
        case.layer(case.x, case.v, case.g, case.bias)


def test_nothing_is_held():
    """Of a call, no tensor; of a prepared call that is forgotten, no launcher."""

    def launchers():
        gc.collect()
        return sum(isinstance(o, launch.Launcher) for o in gc.get_objects())

    v, g = weight()
    before = launchers()
    w = WF.weight_norm(v, g)
    w.backward(torch.ones(6, 5))
    tensors = [weakref.ref(t) for t in (v, g, w, v.grad, g.grad)]
    assert launchers() == before + 2
    del v, g, w
    assert not any(t() is not None for t in tensors)
    launch.forget()
    assert launchers() == before
