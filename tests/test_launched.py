"""Calls on the Triton path without the native library: what their node serves, and what it leaves
to the rest of the package. Values are in tests/backends/native/test_launched.py, for both nodes."""

import pytest
import torch

pytest.importorskip("triton")

import wn_kernels.functional as WF
from tests import library
from tests.comparison import assert_matches, assert_same_bits
from wn_kernels import call, launched, prepare, use_backend
from wn_kernels.backends import reference
from wn_kernels.backends.triton import launch


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Whether the node has served each call."""
    library.hide(monkeypatch)
    launch.forget()
    real, found = launched.launched, []

    def noted(*arguments):
        y = real(*arguments)
        found.append(y is not None)
        return y

    monkeypatch.setattr(launched, "launched", noted)
    with use_backend("triton"):
        yield found
    launch.forget()


def operands(dtype=torch.float32):
    v, g = torch.randn(6, 5, dtype=dtype), torch.rand(6, 1, dtype=dtype) + 0.5
    x, bias = torch.randn(3, 5, dtype=dtype), torch.randn(6, dtype=dtype)
    return [t.requires_grad_() for t in (x, v, g, bias)]


def expected(x, v, g, bias):
    w = reference.weight_norm(v.double(), g.double(), 0, 0.0)
    return torch.nn.functional.linear(x.double(), w, bias.double())


def check(y, tensors):
    assert_matches(y, expected(*tensors), torch.float32, 30, terms=20.0)


def test_once_prepared(served, monkeypatch):
    """A later call neither checks nor plans."""
    tensors = operands()
    check(WF.wn_linear(*tensors), tensors)

    def closed(*_):
        raise AssertionError("planned again")

    monkeypatch.setattr(prepare, "_memoised", closed)
    check(WF.wn_linear(*tensors), tensors)
    with torch.no_grad():
        check(WF.wn_linear(*tensors), tensors)
    assert served == [True] * 3


def test_tables_are_cleared(served):
    WF.wn_linear(*operands())
    assert launched._prepared
    prepare.forget()
    assert not launched._prepared


def test_tf32_is_part_of_the_key(served):
    """A setting that changes between two calls is seen by the second."""
    tensors = operands()
    try:
        for setting in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(setting)
            with launch.recording() as launches:
                WF.wn_linear(*tensors)
            precisions = {each.arguments.get("PRECISION") for each in launches} - {None}
            assert precisions == {"ieee" if setting == "highest" else "tf32"}
    finally:
        torch.set_float32_matmul_precision("highest")
    assert served == [True] * 3


@pytest.mark.parametrize("guards", ["PyTorch's", "none"])
def test_calls_of_the_same_shapes(served, monkeypatch, guards):
    """Calls that differ in a dtype, a layout, a class or a `requires_grad` alone are prepared one
    by one, and each finds its own again."""
    if guards == "none":  # a version of torch whose guards are not known
        monkeypatch.setattr(call, "_Guards", None)
    x, v, g, bias = operands()
    calls = [
        (x, v, g, bias),
        (x.detach(), v, g, bias),
        (x, v.double().detach().requires_grad_(), g, bias),
        (x, v, torch.nn.Parameter(g.detach().double()), bias),
        (x, v, g, torch.nn.Parameter(bias.detach())),
        (x.detach().t().contiguous().t(), v, g, bias),
    ]
    for _ in range(2):
        for tensors in calls:
            y = WF.wn_linear(*tensors)
            check(y, tensors)
            leaves = [t for t in tensors if t.requires_grad]
            dy = torch.randn_like(y)
            found = torch.autograd.grad(y, leaves, dy)
            right = torch.autograd.grad(expected(*tensors), leaves, dy.double())
            for a, b in zip(found, right, strict=True):
                assert_matches(a, b.double(), torch.float32, 30, terms=40.0)
    (known,) = (kept for kept in launched._prepared.values() if len(kept) > 1)
    assert len(known) == len(calls)


def test_a_guard_sees_what_records(served):
    """A transform, a trace and autocast, but neither dispatch modes nor dual numbers. Inference is
    seen by some versions of torch; a call without gradients is the same there."""
    v = torch.randn(3, 4)
    fits = call.guard(v)
    assert fits(v)
    assert not fits(v.requires_grad_())
    assert not fits(v.detach().double())
    assert not fits(torch.nn.Parameter(v.detach()))
    v = v.detach()
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        seen.append(fits(v))
    torch.func.vmap(lambda t: seen.append(fits(v)) or t)(v)
    torch.jit.trace(lambda t: seen.append(fits(t)) or t + 1, (v,), check_trace=False)
    assert seen[:2] == [False] * 2
    assert seen[-1] is False
    assert not call.are_modes_active()
    with torch.autograd.forward_ad.dual_level():
        assert call.are_modes_active()
    with torch._subclasses.FakeTensorMode():
        assert call.are_modes_active()


def test_other_devices_and_dtypes_are_rejected(served):
    x, v, g, bias = operands()
    with pytest.raises(TypeError, match="g has dtype"):
        WF.wn_linear(x, v, g.detach().long(), bias)
    with pytest.raises(ValueError, match="one device"):
        WF.wn_linear(x, v.to("meta"), g, bias)
    with pytest.raises(ValueError, match="g has shape"):
        WF.wn_linear(x, v, torch.rand(5, 1), bias)
    assert True not in served


def test_what_it_leaves_to_the_rest(served):
    """Autocast, a `g` that is no dense row, another class of tensors."""
    tensors = x, v, g, bias = operands()
    with torch.autocast("cpu", torch.bfloat16):
        assert WF.wn_linear(*tensors).dtype == torch.bfloat16
    apart = torch.rand(6, 2)[:, :1]
    check(WF.wn_linear(x, v, apart, bias), (x, v, apart, bias))

    class Other(torch.Tensor):
        pass

    with use_backend("auto"):
        check(WF.wn_linear(x.as_subclass(Other), v, g, bias), tensors)
    assert True not in served


def test_dispatch_modes(served):
    """What records operations gets operators that it can record, in a backward as well."""
    from torch.utils.flop_counter import FlopCounterMode

    tensors = operands()
    with FlopCounterMode(display=False):
        check(WF.wn_linear(*tensors), tensors)
    assert True not in served
    y = WF.wn_linear(*tensors)
    assert served[-1]
    with FlopCounterMode(display=False):  # in the backward alone
        found = torch.autograd.grad(y, tensors, torch.ones_like(y))
    right = torch.autograd.grad(expected(*tensors), tensors, torch.ones(3, 6).double())
    for a, b in zip(found, right, strict=True):
        assert_matches(a, b.double(), torch.float32, 30, terms=40.0)


def test_compiled_autograd(served):
    """A compiler that is set to trace the backward gets a node that it can trace."""
    tensors = operands()
    import torch._dynamo

    with torch._dynamo.config.patch(compiled_autograd=True):
        check(WF.wn_linear(*tensors), tensors)
        assert served == []
        with torch.no_grad():
            check(WF.wn_linear(*tensors), tensors)
    assert served == [True]


def test_second_order_and_no_gradient(served):
    x, v, g, bias = operands(torch.float64)
    small = x[:2, :2], v[:3, :2], g[:3], bias[:3]  # each element takes many launches
    small = tuple(t.detach().clone().requires_grad_() for t in small)
    assert torch.autograd.gradgradcheck(lambda *t: WF.wn_linear(*t), small)
    with torch.no_grad():
        without = WF.wn_linear(x, v, g, bias)
    y = WF.wn_linear(x, v, g, bias)
    assert y.requires_grad
    assert not without.requires_grad
    assert_same_bits(y.detach(), without)
    assert set(served) == {True}
