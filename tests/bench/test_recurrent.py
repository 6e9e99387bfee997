"""What competes in recurrent layers is checked, and right."""

from dataclasses import replace

import pytest
import torch

import wn_kernels
from bench import models, recurrent, suite
from tests.bench.layers import CPU
from wn_kernels.convert import fused

CASES = [case for case in recurrent.CASES if "64 steps" not in case.label]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.label}, {case.mode}")
def test_each_is_right(case):
    runners = {name: build() for name, build in case.competitors(CPU, False).items()}
    for runner in runners.values():
        runner.check()
        runner()
        assert all(p.grad is None for p in runner.parameters)
    assert fused.is_fused(runners["ours"].model)
    assert not wn_kernels.fold(runners["plain"].model)
    if case.mode == "train":
        ours = runners["ours"]
        g = [p for name, p in ours.model.named_parameters() if name.endswith("original0")]
        # A cell keeps the products with V, and no weight.
        products = 4 * recurrent.BATCH * sum(map(len, g)) if "Cell" in case.label else 0
        assert ours.saved_bytes() <= 1.02 * runners["eager"].saved_bytes() + products


def test_every_weight_is_normed():
    for label, model in recurrent.LAYERS.items():
        layer = model.build()
        assert len(layer.parametrizations) == model.layers, label
        assert not any(name.startswith("weight") for name in layer._parameters)


def test_what_is_wrong_is_not_timed(monkeypatch):
    case = replace(CASES[0])
    runner = case.competitors(CPU, False)["ours"]()
    with torch.no_grad():
        next(runner.model.parameters()).mul_(1.01)
    monkeypatch.setattr(models.ModelCase, "competitors", lambda *_: {"ours": lambda: runner})
    with pytest.raises(AssertionError, match="ours is wrong"):
        suite.run_case(case, CPU, 0.01)
