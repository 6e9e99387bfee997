"""What competes is checked against float64, by every path, and does the work that it says."""

import dataclasses

import pytest
import torch

from bench import cases, cli, norms
from bench.providers import variants
from tests.bench.layers import CONV, CPU, QUICK, TINY
from wn_kernels import plan, prepare, tuning


@pytest.mark.parametrize("case", TINY + CONV)
@pytest.mark.parametrize("name", QUICK)
def test_providers_are_right(case, name):
    case.competitors(CPU, full=False)[name]().check()


def test_the_compiled_baseline_is_right():
    runner = TINY[0].competitors(CPU, full=True)["compiled"]()
    runner.check()
    assert runner.module._compiled_call_impl is not None


@pytest.mark.parametrize("case", TINY + CONV)
def test_every_path_is_right_and_taken(case):
    """In its session each variant is served that way, and nothing is left of it afterwards."""
    found = variants(case, CPU)
    layer = case.competitors(CPU, full=False)["ours"]().module
    ((_, served),) = tuning.calls_of(layer, (torch.zeros(case.x_shape),))
    assert {"ours: reference", f"ours: {served}, materialize/materialize"} < set(found)
    for name in found:
        runner = case.competitors(CPU, full=True)[name]()
        with runner.session():
            runner.check()
            if ", " in name:
                ((call, backend),) = tuning.calls_of(runner.module, (runner.x,))
                choice = prepare.planned(call, backend)
                assert f"ours: {backend}, {choice}" == name
    assert not prepare._fixed
    assert not plan.is_forced()


@pytest.mark.parametrize("dtype", cli.DTYPES)
def test_dtypes(dtype):
    """Checked by what the dtype accounts for: a tenth too much is seen in each."""
    case = dataclasses.replace(TINY[1], dtype=dtype)
    runner = case.competitors(CPU, full=False)["ours"]()
    assert runner.x.dtype == runner.module.weight_v.dtype == getattr(torch, dtype)
    runner.check()
    with torch.no_grad():
        runner.module.weight_g.mul_(1.1)
    runner.right.clear()
    runner.check()  # a layer of its own, right as well
    runner.module.forward = lambda x, right=runner.module.forward: 1.1 * right(x)
    with pytest.raises(AssertionError, match="ours is wrong"):
        runner.check()


def test_work():
    """Operations and bytes, by hand: 4 × 24 × 16 products, and three times that with gradients."""
    operations, moved = TINY[0].work()
    assert operations == 2 * 4 * 24 * 16
    assert moved == 4 * (4 * 24 + 24 * 16 + 4 * 16)
    assert TINY[1].work() == (3 * operations, 3 * moved)
    # Every input is spread over 3 × 5 outputs; (9 − 1) · 2 + 5 = 21 pixels come out.
    assert CONV[0].work()[0] == 2 * (2 * 4 * 9) * 3 * 5
    assert CONV[0].work()[1] == 4 * (2 * 4 * 9 + 4 * 3 * 5 + 2 * 3 * 21)


NORMS = [
    norms.NormCase(shape, dim, mode)
    for shape, dim in [((6, 5), 0), ((6, 5), 1), ((3, 4, 5), 1), ((4, 6), None)]
    for mode in cases.MODES
]


@pytest.mark.parametrize("case", NORMS)
def test_norms_are_checked(case, monkeypatch):
    for build in case.competitors(CPU, full=False).values():
        runner = build()
        runner.check()
        runner()
    monkeypatch.setitem(norms.PROVIDERS, "ours", lambda v, g, dim: 1.1 * v * g)
    with pytest.raises(AssertionError, match="ours is wrong"):
        case.competitors(CPU, full=False)["ours"]().check()
