"""Recurrent layers over a sequence: the native library's steps against those in float64."""

import dataclasses
import math
import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.comparison import assert_matches, assert_same_bits
from wn_kernels import plan, prepare
from wn_kernels.backends import recurrence, reference
from wn_kernels.backends.recurrence import CELLS, GATES
from wn_kernels.call import NORMS
from wn_kernels.operators import native_library
from wn_kernels.plan import devices

pytestmark = pytest.mark.usefixtures("forced")

# Steps, batch, units: parts of a vector, of a panel and of a tile of columns, and several of each.
SIZES = [(1, 1, 2), (3, 2, 5), (2, 3, 33), (4, 5, 16), (2, 9, 70), (3, 4, 32), (2, 1, 130)]


def operands(cell, steps, batch, units, inputs=3, dtype=torch.float32):
    """Tensors by name. `p` is computed from `x`."""
    rows = GATES[cell] * units
    size = units**-0.5

    def random_(*shape, scale=1.0):
        return torch.randn(shape, dtype=dtype) * scale

    found = {
        "x": random_(steps, batch, inputs),
        "v_x": random_(rows, inputs),
        "g_x": torch.rand(rows, 1, dtype=dtype) + 0.5,
        "b_x": random_(rows, scale=0.3),
        "h": random_(batch, units),
        "c": random_(batch, units) if CELLS[cell] == "lstm" else None,
        "v": random_(rows, units, scale=size),
        "g": torch.rand(rows, 1, dtype=dtype) + 0.5,
        "b": random_(rows, scale=0.3),
    }
    if CELLS[cell] == "relu":
        found["b_x"].abs_().add_(0.5)  # not all arguments are negative
    return {name: t if t is None else t.requires_grad_() for name, t in found.items()}


def product(t, eps=0.0, norm="l2"):
    w = t["v_x"] if t["g_x"] is None else reference.weight_norm(t["v_x"], t["g_x"], 0, eps, norm)
    return torch.nn.functional.linear(t["x"], w, t["b_x"])


def run(cell, is_reversed, t, eps=0.0, norm="l2"):
    """The library's `(y, h_n, c_n)`."""
    of_p = tuple(t[name] for name in ("x", "v_x", "g_x", "b_x"))
    rest = (t[name] for name in ("h", "c", "v", "g", "b"))
    p = product(t, eps, norm)
    return native_library().recurrence(cell, is_reversed, p, *rest, eps, norm, of_p)


def right(cell, is_reversed, t, eps=0.0, norm="l2"):
    """Returns what `run` does, computed in float64, and the operands that it was computed from."""
    wide = {k: None if s is None else s.detach().double().requires_grad_() for k, s in t.items()}
    w = (
        wide["v"]
        if wide["g"] is None
        else reference.weight_norm(wide["v"], wide["g"], 0, eps, norm)
    )
    arguments = product(wide, eps, norm), wide["h"], wide["c"], w, wide["b"]
    return recurrence.states(CELLS[cell], is_reversed, *arguments), wide


def check(cell, is_reversed, t, dtype, eps=0.0, norm="l2"):
    """Values with and without a graph, and gradients."""
    expected, wide = right(cell, is_reversed, t, eps, norm)
    with torch.no_grad():
        alone = run(cell, is_reversed, t, eps, norm)
    found = run(cell, is_reversed, t, eps, norm)
    steps, _, units = found[0].shape
    length = units * steps
    for y, bare, w in zip(found, alone, expected, strict=True):
        assert (y is None) == (w is None)
        if w is not None:
            assert_matches(y, w.detach(), dtype, length, roundings=8)
            assert_same_bits(y.detach(), bare)
    pairs = [(y, w) for y, w in zip(found, expected, strict=True) if w is not None]
    grads = [torch.randn_like(y) for y, _ in pairs]
    names = [name for name, s in t.items() if s is not None]
    of_wide = torch.autograd.grad(
        [w for _, w in pairs], [wide[n] for n in names], [g.double() for g in grads]
    )
    of_found = torch.autograd.grad([y for y, _ in pairs], [t[n] for n in names], grads)
    terms = max(g.norm().item() for g in of_wide)
    for name, g, w in zip(names, of_found, of_wide, strict=True):
        assert_matches(g, w, dtype, length, roundings=16, scale=terms / 4, terms=terms, what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", range(len(CELLS)), ids=CELLS)
def test_values_and_gradients(cell, size, dtype):
    for is_reversed in (False, True):
        check(cell, is_reversed, operands(cell, *size, dtype=dtype), dtype)


@pytest.mark.parametrize("cell", range(len(CELLS)), ids=CELLS)
def test_norms_and_what_a_call_may_lack(cell):
    for norm in NORMS:
        check(cell, False, operands(cell, 3, 2, 20), torch.float32, norm=norm)
    check(cell, False, operands(cell, 3, 2, 20), torch.float32, eps=1.0)
    for names in (("g",), ("b",), ("g_x",), ("b_x", "b"), ("g", "g_x", "b", "b_x")):
        t = operands(cell, 3, 2, 20) | dict.fromkeys(names)
        check(cell, True, t, torch.float32)


def test_fuzz():
    choose = random.Random(5)
    for _ in range(60):
        cell = choose.randrange(len(CELLS))
        size = choose.randint(1, 6), choose.randint(1, 11), choose.randint(1, 80)
        t = operands(cell, *size, inputs=choose.randint(1, 40))
        check(cell, choose.random() < 0.5, t, torch.float32, norm=choose.choice(NORMS))


@pytest.mark.parametrize("cell", range(len(CELLS)), ids=CELLS)
def test_threads_change_no_bit(cell):
    t = operands(cell, 4, 6, 160)
    names = [name for name, s in t.items() if s is not None]
    every = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, *ends = run(cell, False, t)
            kept = [y, *(e for e in ends if e is not None)]
            grads = torch.autograd.grad(sum(map(torch.sum, kept)), [t[n] for n in names])
            # PyTorch's products of p are those of the threads.
            every.append([*kept, *(g for n, g in zip(names, grads, strict=True) if n in "hcvgb")])
    finally:
        torch.set_num_threads(before)
    for other in every[1:]:
        for a, b in zip(every[0], other, strict=True):
            assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("is_recorded", [False, True])
def test_gates_at_their_ends(is_recorded):
    """Large arguments saturate, infinite ones too, and a NaN stays where it is."""
    values = [0.0, -0.0, 1e-6, -0.3, 0.624, 0.626, -9.0, 87.0, -89.0, 1e4, -1e30]
    values += [float("inf"), -float("inf")]
    for cell, name in enumerate(CELLS):
        units = len(values)
        t = operands(cell, 1, 2, units) | dict.fromkeys(("g", "g_x", "b", "b_x"))
        with torch.no_grad():
            t["v_x"].zero_()
            t["v"].zero_()
            p = torch.tensor(values).repeat(1, 2, GATES[cell])
            p[0, 1, 0] = float("nan")
        rest = (t[n] for n in ("h", "c", "v", "g", "b"))
        of_p = tuple(t[n] for n in ("x", "v_x", "g_x", "b_x"))
        wide = [s if s is None else s.double() for s in (t["h"], t["c"], t["v"], None)]
        expected = recurrence.states(name, False, p.double(), *wide)
        with torch.set_grad_enabled(is_recorded):
            found = native_library().recurrence(cell, False, p, *rest, 0.0, "l2", of_p)
        for y, w in zip(found, expected, strict=True):
            if w is not None:
                # A gate of a gru is a difference of states.
                limit = 4e-7 * w.abs() + (1e-7 if name == "gru" else 1e-37)
                same = (y.isnan() & w.isnan()) | (y.double() == w)
                assert (same | ((y.double() - w).abs() <= limit)).all()
        assert found[0].isnan().sum() == 1


@pytest.mark.parametrize("cell", range(len(CELLS)), ids=CELLS)
def test_derivatives_of_every_order(cell):
    torch.manual_seed(cell)
    for lacks in ((), ("g", "g_x"), ("b", "b_x")):
        t = operands(cell, 2, 2, 3, dtype=torch.float64) | dict.fromkeys(lacks)
        names = [name for name, s in t.items() if s is not None]

        def output(*tensors, t=t, names=names):
            found = run(cell, False, t | dict(zip(names, tensors, strict=True)))
            return tuple(y for y in found if y is not None)

        tensors = [t[n] for n in names]
        if CELLS[cell] == "relu":  # no argument is at the kink
            with torch.no_grad():
                t["x"].abs_()
        assert gradcheck(output, tensors, fast_mode=True, check_batched_grad=True)
        assert gradgradcheck(output, tensors, fast_mode=True)

        def of_grads(*tensors, output=output):
            first = torch.autograd.grad(
                sum(y.square().sum() for y in output(*tensors)), tensors[0], create_graph=True
            )[0]
            return torch.autograd.grad(first.square().sum(), tensors[0], create_graph=True)[0]

        assert gradcheck(of_grads, tensors, fast_mode=True)


def test_a_graph_goes_through_the_layer_alone():
    """The gradient of the weight has no part that goes through the state twice."""
    t = operands(0, 2, 2, 3, dtype=torch.float64)
    for create_graph in (False, True):
        h = t["v"][:2] * 2
        y = run(0, False, t | {"h": h})[0]
        of_h, of_v = torch.autograd.grad(y.sum(), (h, t["v"]), create_graph=create_graph)
        y = run(0, False, t | {"h": h.detach()})[0]
        by_layer = torch.autograd.grad(y.sum(), t["v"])[0]
        by_layer[:2] += 2 * of_h.detach()
        assert_matches(of_v, by_layer, torch.float64, 64)


def test_only_what_is_needed():
    """Frozen parts get no gradient, and the others the same one."""
    t = operands(1, 3, 2, 20)
    names = [name for name, s in t.items() if s is not None]
    y = run(1, False, t)[0]
    every = dict(zip(names, torch.autograd.grad(y.sum(), [t[n] for n in names]), strict=True))
    for name in ("x", "h", "v", "g", "b"):
        alone = {k: None if s is None else s.detach() for k, s in t.items()}
        alone[name] = t[name]
        y, h_n, _ = run(1, False, alone)
        assert_same_bits(torch.autograd.grad(y.sum(), t[name])[0], every[name])
        assert h_n.requires_grad
    y, h_n, _ = run(1, False, {k: None if s is None else s.detach() for k, s in t.items()})
    assert not y.requires_grad


def test_operands_that_were_changed():
    """A backward notices a change of what it needs. A second one needs memory that is kept."""
    t = operands(2, 3, 2, 20)
    total = run(2, False, t)[0].sum()
    with torch.no_grad():
        t["v"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    y = run(2, False, t)[0]
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_what_is_not_served():
    """It returns `None` for what others have to look at, and leaves `p` as it is."""
    t = operands(0, 3, 2, 20)
    p = product(t).detach()
    of_p = tuple(t[n] for n in ("x", "v_x", "g_x", "b_x"))
    good = (0, False, p, t["h"], t["c"], t["v"], t["g"], t["b"], 0.0, "l2", of_p)
    before = p.clone()

    def served(**changes):
        arguments = list(good)
        for at, value in changes.items():
            arguments[int(at[1:])] = value
        return native_library().recurrence(*arguments)

    tiny = torch.full_like(t["v"], 1e-20).detach()
    wrong = {
        "a1 of a wrong cell": {"a0": 1},
        "no c": {"a4": None},
        "a c of another shape": {"a4": t["c"][:1]},
        "half": {"a2": p.half()},
        "columns": {"a2": p.transpose(0, 1)},
        "flat": {"a2": p[0]},
        "short g": {"a6": t["g"][1:]},
        "short bias": {"a7": t["b"][1:]},
        "a list": {"a3": [1.0]},
        "another norm": {"a9": "l3"},
        "a norm out of range": {"a5": tiny},
        "meta": {"a2": p.to("meta")},
    }
    for what, changes in wrong.items():
        assert served(**changes) is None, what
        assert_same_bits(p, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert served() is None
    with pytest.raises(TypeError, match="expected 11 arguments"):
        native_library().recurrence(*good[:-1])
    assert served() is not None


def test_what_the_cost_model_picks():
    """The library serves short or narrow sequences of an LSTM, and every other layer."""
    sizes = 8, 256, 256, torch.float32
    for recorded in (False, True):
        assert plan.sequences.pays(True, 4, 2, *sizes, recorded)
        for steps in (1, 4, 64, 1024):
            assert plan.sequences.pays(False, 3, steps, *sizes, recorded)
        assert not plan.sequences.pays(True, 4, 4096, 64, 256, 256, torch.float32, recorded)
    # The library saves nothing by its steps if the weights are formed in any case.
    wide = True, 4, 64, 32, 256, 256, torch.float32, False
    assert plan.sequences.pays(*wide)
    assert not plan.sequences.pays(*wide, is_formed=True)


@pytest.mark.parametrize("cell", range(len(CELLS)), ids=CELLS)
def test_every_nan_stays(cell):
    """Whatever its bits are."""
    t = operands(cell, 1, 1, 20) | dict.fromkeys(("g", "g_x", "b", "b_x"))
    rest = (t[n] for n in ("h", "c", "v", "g", "b"))
    of_p = tuple(t[n] for n in ("x", "v_x", "g_x", "b_x"))
    bits = torch.tensor([-1, 0x7FC00001, 0x7F800001, 0x7FC00000] * 5, dtype=torch.int32)
    p = bits.view(torch.float32).repeat(1, 1, GATES[cell])
    with torch.no_grad():
        y = native_library().recurrence(cell, False, p, *rest, 0.0, "l2", of_p)[0]
    assert y.isnan().all()


def test_a_closed_gate_is_zero():
    """That of a lstm's memory, whatever the memory is."""
    t = operands(0, 1, 1, 20) | dict.fromkeys(("g", "g_x", "b", "b_x"))
    p = torch.full((1, 1, 80), -math.inf)
    rest = (torch.zeros(1, 20), torch.full((1, 20), 1e38), t["v"], None, None)
    of_p = tuple(t[n] for n in ("x", "v_x", "g_x", "b_x"))
    with torch.no_grad():
        _, _, c = native_library().recurrence(0, False, p, *rest, 0.0, "l2", of_p)
    assert (c == 0).all()


def test_what_may_be_written_to():
    """The backward needs neither the output, nor the bias, nor the inputs."""
    for cell in range(len(CELLS)):
        t = operands(cell, 3, 2, 20)
        names = [n for n in ("h", "v", "g", "b") if t[n] is not None]
        right = torch.autograd.grad(run(cell, False, t)[0].sum(), [t[n] for n in names])
        p = product(t).detach()
        of_p = tuple(t[n] for n in ("x", "v_x", "g_x", "b_x"))
        rest = (t[n] for n in ("h", "c", "v", "g", "b"))
        y = native_library().recurrence(cell, False, p, *rest, 0.0, "l2", of_p)[0]
        total = y.sum()
        with torch.no_grad():
            for changed in (y, t["b"], t["x"], t["v_x"]):
                changed.mul_(2)
        for g, expected in zip(
            torch.autograd.grad(total, [t[n] for n in names]), right, strict=True
        ):
            assert_same_bits(g, expected)


@pytest.mark.parametrize("cell", range(len(CELLS)), ids=CELLS)
def test_a_graph_that_is_kept(cell):
    """Its gates are not overwritten by the gradients, and neither are those that a hook holds."""
    t = operands(cell, 3, 2, 40)
    leaves = [s for s in t.values() if s is not None]
    held = []

    def hold(saved):
        held.append((saved, saved.clone()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda saved: saved):
        hooked = run(cell, False, t)[0]
    y = run(cell, False, t)[0]
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    third = torch.autograd.grad(hooked, leaves, dy)
    for grads in zip(first, second, third, strict=True):
        for other in grads[1:]:
            assert_same_bits(grads[0], other)
    assert len(held) > 3
    for saved, before in held:
        if before.any():
            assert_same_bits(saved, before)


def test_other_rates_are_heeded(monkeypatch):
    """The way of a layer is chosen anew after the plans are forgotten."""
    size = True, 4, 16, 8, 256, 256, torch.float32, False
    before = plan.sequences.pays(*size)
    slow = dataclasses.replace(devices.native(), own=1e-3 if before else 1e3)
    monkeypatch.setattr(plan.sequences, "native", lambda: slow)
    assert plan.sequences.pays(*size) == before
    prepare.forget()
    assert plan.sequences.pays(*size) != before
    monkeypatch.undo()
    prepare.forget()
