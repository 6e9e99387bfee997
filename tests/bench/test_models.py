"""Whole models are compared with float64 by eager's own error, and what is wrong is named."""

import pytest
import torch
from torch.nn.utils import parametrizations

from bench import models
from bench.measure.timing import session_of
from bench.models import AtKinks, Model, ModelCase, ModelRunner, Wrong, assert_as_good
from tests.bench.layers import CPU

EPS = torch.finfo(torch.float32).eps


def off(errors):
    """Results of so large a relative error each, eager's of 1e-6, and the right ones."""
    right = {name: torch.full((16,), 2.0, dtype=torch.float64) for name in errors}
    ours = {name: t * (1 + errors[name]) for name, t in right.items()}
    eager = {name: t * (1 + 1e-6) for name, t in right.items()}
    return ours, eager, right


def test_within_twice_eager_s_error():
    assert_as_good(*off({"output": 2e-6, "a": -2e-6}), torch.float32)


def test_what_is_wrong_is_named():
    """The worst first, with ours', eager's error and the bound."""
    errors = {"output": 0.0, "a": 0.02, "b": 0.5, "c": 1e-5}
    with pytest.raises(Wrong) as found:
        assert_as_good(*off(errors), torch.float32)
    error = found.value
    assert error.what == "a and 1 more are wrong"
    assert [miss.name for miss in error.worst] == ["b", "a"]
    worst = error.details["worst"][0]
    expected = {"error": 0.5, "eager": 1e-6, "bound": 2e-6 + 8 * EPS}
    for name, value in expected.items():
        assert f"{worst[name]:.4e}" == f"{value:.4e}", name
    assert "b 5.0e-01 (eager's 1.0e-06, bound 3.0e-06), a 2.0e-02 (eager's" in str(error)


def test_kinks_are_named_as_well():
    """They are below a hundredth; few of them are allowed, but not in the output."""
    errors = {"output": 0.0} | {f"p{i}": (i + 1) * 1e-4 for i in range(6)}
    with pytest.raises(AtKinks) as found:
        assert_as_good(*off(errors), torch.float32)
    assert found.value.what == "6 of 7 are off by more than rounding"
    assert [miss.name for miss in found.value.worst] == ["p5", "p4", "p3", "p2"]
    few = {"output": 0.0} | {f"p{i}": 1e-3 * (i == 0) for i in range(12)}
    assert_as_good(*off(few), torch.float32)
    with pytest.raises(Wrong, match="output is wrong"):
        assert_as_good(*off(few | {"output": 1e-3}), torch.float32)


def test_zeros_and_nan_are_wrong():
    ours, eager, right = off({"output": 0.0, "a": 0.0})
    for wrong in (torch.zeros(16), torch.full((16,), torch.nan)):
        with pytest.raises(Wrong, match="a is wrong; the worst: a"):
            assert_as_good(ours | {"a": wrong}, eager, right, torch.float32)
    nothing = {name: 1e-30 * t for name, t in right.items()}
    with pytest.raises(Wrong, match="zeros would pass for 2 of 2"):
        assert_as_good(ours, eager, nothing, torch.float32)


TINY = Model(
    build=lambda: torch.nn.Sequential(parametrizations.weight_norm(torch.nn.Linear(6, 4))),
    small=(2, 6),
    x_shape=(3, 6),
    call=lambda model, x: model(x),
    layers=1,
)


def test_frozen_weights_are_computed_once(monkeypatch):
    """A runner keeps them inside its session, and so does its twin."""
    monkeypatch.setitem(models.MODELS, "tiny", TINY)
    build = ModelCase("tiny", "infer").competitors(CPU, full=False)["frozen"]
    for run in (build(), build().twin()):
        with session_of(run)():
            run.check()
            with torch.no_grad():
                weight = run.model[0].weight
                run()
                assert run.model[0].weight is weight
        assert run.model[0].weight is not weight
    assert "frozen" not in ModelCase("tiny", "train").competitors(CPU, full=False)


def test_a_runner_names_its_model(monkeypatch):
    """With the worst parameters, of the model that is fused."""
    monkeypatch.setitem(models.MODELS, "tiny", TINY)
    run = ModelRunner(ModelCase("tiny", "train"), "ours", CPU)
    with torch.no_grad():
        run.model[0].bias.add_(1)
    with pytest.raises(Wrong) as found:
        run.check()
    assert str(found.value).startswith("ours is wrong for tiny train, and not timed: ")
    assert "; the worst: " in str(found.value)
    assert found.value.details["worst"][0]["name"]
    assert models.parameters_of(models.MODELS["tiny"].build) == 6 * 4 + 4 + 4
