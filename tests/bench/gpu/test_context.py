"""What a section is given: its time, and what becomes of cases that fail."""

import dataclasses
import math
import time
from typing import ClassVar

import pytest
import torch

from bench import cases
from bench.gpu import results
from bench.gpu.context import RECENT, Clock, Context
from bench.measure import timing
from bench.models import Miss, Wrong
from bench.providers import PROVIDERS
from bench.runner import Runner
from tests.bench.layers import CPU, TINY
from wn_kernels import WNLinear


@pytest.fixture
def context(tmp_path):
    return Context("linear", tmp_path, time.time() + 100, False, None, CPU)


def lines_of(context, kind):
    path = context.folder / results.RESULTS
    return results.of(results.read(path), context.section, kind) if path.exists() else []


def test_cases_that_the_time_does_not_reach(context):
    """They are named, and the case in progress is done."""
    done = []
    for case in context.cases(["a", "b", "c"]):
        done.append(case)
        context.until = time.time() - 1
    assert done == ["a"]
    assert [line["cases"] for line in lines_of(context, "left out")] == [["b", "c"]]


def test_no_case_is_started_that_the_time_does_not_hold(context):
    """By the longest of the last few, without what was timing."""
    context.setups = [50.0] + [3.0] * RECENT
    context.until = time.time() + 10
    done = []
    for case in context.cases(["a", "b", "c"]):
        done.append(case)
        context.setups.append(20.0 if case == "b" else 0.0)
    assert done == ["a", "b"]
    assert [line["cases"] for line in lines_of(context, "left out")] == [["c"]]


def test_setting_up_is_what_is_not_timing(context):
    for _ in context.cases(["a"]):
        time.sleep(0.05)
        context.clock.wall({"run": lambda: time.sleep(0.05)}, 0.0)
    (setup,) = context.setups
    assert context.clock.spent >= 0.05
    assert 0.05 <= setup < context.clock.spent


def test_so_many_cases_of_each_kind(context):
    context.most = 1
    assert list(context.cases(["a", "b"], [], ["c", "d"])) == ["a", "c"]


def test_a_case_takes_its_share_of_the_time(context):
    """The time that is left, without what setting up takes, is shared by the cases that are left.
    A share is never large, and there is none when the time is up."""
    shares = {}
    for case in context.cases(["a", "b", "c"]):
        context.setups[:] = [] if case == "a" else [9.0, 0.2, 0.4]
        context.until = time.time() + {"a": 1.5, "b": 0.8, "c": 0.3}[case]
        shares[case] = context.seconds()
        context.until = time.time() + 100
    assert {case: round(share, 2) for case, share in shares.items()} == {
        "a": 0.2,  # TIMING of a third
        "b": 0.25,  # a half, without a half of the mean
        "c": 0.3,
    }
    context.until = time.time() + 1000
    assert context.seconds() <= 1
    context.until = time.time() - 5
    assert context.seconds() == 0


def test_it_goes_on_after_an_error(context):
    with context.attempt("this case"):
        raise ValueError("that went wrong\nin two lines")
    assert context.failed == ["this case: ValueError: that went wrong"]
    (line,) = lines_of(context, "error")
    assert "in two lines" in line["traceback"]


def test_a_device_that_is_lost_ends_the_section(context, monkeypatch):
    """After an illegal access every other case would fail as well."""

    def synchronize(device):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    lost = dataclasses.replace(context, device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match="illegal memory access"), lost.attempt("this case"):
        raise ValueError
    assert lines_of(context, "error")


def test_a_wrong_provider_is_not_timed(context):
    """The others are."""
    (case, _) = TINY

    class Wrong(WNLinear):
        def forward(self, input):
            return 1.01 * super().forward(input)

    def make(case, layer):
        wrong = Wrong(layer.in_features, layer.out_features)
        wrong.load_state_dict(layer.state_dict())
        return wrong

    wrong = dataclasses.replace(PROVIDERS["ours"], make=make)
    builds = {
        name: lambda name=name, provider=provider: Runner(case, name, provider, CPU)
        for name, provider in {"eager": PROVIDERS["eager"], "ours": wrong}.items()
    }
    assert list(context.checked(builds)) == ["eager"]
    (line,) = lines_of(context, "wrong")
    assert "ours is wrong" in line["message"]


def test_what_a_provider_has_to_say_of_an_error(context):
    """Its worst results are fields of the line."""

    class Runner:
        def check(self):
            raise Wrong("ours is wrong", [Miss("a", 3.0, 0.5, 1.0), Miss("b", math.nan, 0.5, 1.0)])

    assert context.checked({"ours": Runner}) == {}
    (line,) = lines_of(context, "wrong")
    assert [miss["name"] for miss in line["worst"]] == ["b", "a"]
    assert line["worst"][1] == {"name": "a", "error": 3.0, "eager": 0.5, "bound": 1.0}
    worst = "b nan (eager's 5.0e-01, bound 1.0e+00), a 3.0e+00 (eager's 5.0e-01, bound 1.0e+00)"
    assert context.failed == [f"ours is wrong; the worst: {worst}"]


class Graph:
    """Replays so many calls in so many milliseconds each."""

    captured: ClassVar[list] = []
    milliseconds = 1.0

    def __init__(self, runs):
        self.captured.append(list(runs))
        self.calls = len(runs)

    def __call__(self):
        time.sleep(self.calls * self.milliseconds / 1e3)


@pytest.fixture
def graph(monkeypatch):
    monkeypatch.setattr("bench.gpu.context.Replay", Graph)
    monkeypatch.setattr(Graph, "captured", [])
    return Graph


def test_kernels_are_timed_in_graphs(graph, monkeypatch):
    """A graph runs all twins in turn. The host times one runner by itself."""
    monkeypatch.setattr(timing, "sets_beyond_cache", lambda size, device: 3)
    clock = Clock(CPU)
    run = TINY[0].competitors(CPU, full=False)["ours"]()
    sets = clock.sets(run)
    assert len({one.x.data_ptr() for one in sets}) == 3
    stats = clock.graphs({"ours": sets}, 0.0)
    assert graph.captured == [sets]
    assert 1e-3 <= stats["ours"].median < 1e-2


def test_few_sets_fill_a_graph(graph):
    """Those that the cache holds whatever is done, each several times."""
    runs = [lambda i=i: i for i in range(timing.FEW_SETS)]
    Clock(CPU).graphs({"ours": runs}, 0.0)
    (captured,) = graph.captured
    assert captured == runs * (timing.CALLS // timing.FEW_SETS)


@pytest.mark.parametrize(("size", "calls"), [(1e5, 1), (1e8, 20)])
def test_slow_calls_need_no_twins(size, calls, graph):
    """Where reading the operands takes less than a hundredth of a call."""
    runs = [lambda i=i: i for i in range(20)]
    stats = Clock(CPU).graphs({"ours": runs}, 0.0, size)
    assert [len(captured) for captured in graph.captured] == ([20, 1] if calls == 1 else [20])
    assert graph.captured[-1] == runs[:calls]
    assert 1e-3 <= stats["ours"].median < 1e-2


@pytest.mark.parametrize("kind", ["tf32", "autocast"])
def test_a_case_in_another_precision(kind, monkeypatch):
    """It runs in that precision, and is compared by its unit of rounding."""
    for case in TINY:
        case = dataclasses.replace(case, precision=kind)
        run = case.competitors(CPU, full=False)["ours"]()
        with run.session():
            run.check()
            precision = torch.get_float32_matmul_precision()
            assert precision == ("high" if kind == "tf32" else "highest")
            with torch.no_grad():
                dtype = run.module(run.x).dtype
            assert dtype == (torch.bfloat16 if kind == "autocast" else torch.float32)
    assert torch.get_float32_matmul_precision() == "highest"


def test_channels_last():
    case = cases.Case("2d", "Conv2d", (4, 8, 3), (2, 4, 9, 9), "train", channels_last=True)
    run = case.competitors(CPU, full=False)["ours"]()
    assert run.x.stride(1) == run.twin().x.stride(1) == 1
    run.check()
