"""What competes in steps with second derivatives is checked, and right."""

import pytest
import torch

from bench import second_order, suite
from tests.bench.layers import CPU


@pytest.mark.parametrize("case", second_order.CASES, ids=lambda case: case.label)
def test_each_is_right(case):
    runners = {name: build() for name, build in case.competitors(CPU, False).items()}
    for runner in runners.values():
        runner.check()
        runner()
        assert all(leaf.grad is None for leaf in runner.leaves)
    assert runners["ours"].saved_bytes() <= 1.02 * runners["eager"].saved_bytes()


@pytest.mark.parametrize("case", second_order.CASES, ids=lambda case: case.label)
def test_what_is_wrong_is_not_timed(case, monkeypatch):
    wrong = {name: build for name, build in case.competitors(CPU, False).items() if name == "ours"}
    runner = wrong["ours"]()
    with torch.no_grad():
        next(runner.model.parameters()).mul_(1.01)
    monkeypatch.setattr(second_order.StepCase, "competitors", lambda *_: {"ours": lambda: runner})
    with pytest.raises(AssertionError, match="ours is wrong"):
        suite.run_case(case, CPU, 0.01)


def test_the_loss_depends_on_the_slope():
    """Its gradients are not those of the output alone."""
    for case in second_order.CASES:
        runner = case.competitors(CPU, False)["ours"]()
        x = runner.x
        whole = runner.loss(runner.model, x)
        values = runner.model(x)
        alone = values.abs().mean() if case.label.startswith("eikonal") else values.mean()
        assert whole > 1.001 * alone
