"""How the plans of a call are timed beside the pick."""

from itertools import cycle

import pytest
import torch

from bench import picks
from bench.picks import duel, race

CPU = torch.device("cpu")


class Run:
    """A call of a plan that takes these seconds in turn."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.samples = cycle(seconds), 0

    def __call__(self) -> None:
        pass


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    def sample(run: Run, repeats: int, device: torch.device) -> float:
        run.samples += 1
        return next(run.seconds) * repeats

    monkeypatch.setattr(picks, "sampler", lambda device: sample)
    monkeypatch.setattr("bench.measure.timing.warm", sample)


def test_plans_near_the_fastest_are_timed_most():
    runs = {"pick": Run(3e-3), "near": Run(1.04e-3), "far": Run(2e-3), "fast": Run(1e-3)}
    runs["hopeless"] = Run(9e-3)
    times = race(runs, {"pick"}, CPU, 0.0)
    assert min(times, key=times.__getitem__) == "fast"
    assert round(times["near"], 6) == 1.04e-3
    assert round(times["hopeless"], 6) == 9e-3
    counted = {name: run.samples for name, run in runs.items()}
    assert counted["near"] == counted["fast"] == counted["pick"] > counted["far"]
    assert counted["far"] > counted["hopeless"] == 1


def test_a_duel_ends_when_it_is_decided():
    slow, fast = Run(1.2e-3), Run(1e-3)
    assert round(duel(slow, fast, CPU, 0.0), 6) == 1.2
    decided = slow.samples
    open_one, other = Run(1.0e-3, 1.11e-3), Run(1e-3)
    assert 1.0 <= duel(open_one, other, CPU, 0.0) <= 1.11
    assert open_one.samples > decided


def test_the_plan_that_was_the_fastest_is_compared_again():
    runs = {"pick": Run(1e-3), "before": Run(1.03e-3), "slow": Run(2e-3)}
    found = picks._measured("x", "infer", runs, "before", CPU, 0.0)
    assert (found.picked, found.fastest, found.loss) == ("pick", "pick", 1.0)
    assert round(found.again, 6) == 1.03
    assert picks._measured("x", "infer", runs, None, CPU, 0.0).again is None
    assert picks._measured("x", "infer", runs, "gone", CPU, 0.0).again == float("inf")


def test_random_layers_depend_on_the_seed_alone():
    assert [*picks.random_cases(5, 3)] == [*picks.random_cases(5, 3)]
    assert [*picks.random_cases(5, 3)] != [*picks.random_cases(5, 4)]
