"""What a section is given: its time, and what becomes of cases that fail."""

import dataclasses
import time

import pytest
import torch

from bench import cases, timing
from bench.cases import Runner
from bench.gpu import results
from bench.gpu.context import Clock, Context
from bench.providers import PROVIDERS
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


def test_a_case_takes_its_share_of_the_time(context):
    """Of what is left for those that are left; never much, and nothing when it is over."""
    shares = {}
    for case in context.cases(["a", "b"]):
        context.until = time.time() + 1
        shares[case] = context.seconds()
    assert {case: round(share, 1) for case, share in shares.items()} == {"a": 0.2, "b": 0.4}
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


def test_kernels_are_timed_in_graphs(monkeypatch):
    """Of all twins in turn; the host by itself."""
    captured = []

    class Replay:
        def __init__(self, runs):
            captured.append(list(runs))
            self.calls = len(runs)

        def __call__(self):
            time.sleep(1e-3)

    monkeypatch.setattr("bench.gpu.context.Replay", Replay)
    monkeypatch.setattr(timing, "sets_beyond_cache", lambda size, device: 3)
    clock = Clock(CPU)
    run = TINY[0].competitors(CPU, full=False)["ours"]()
    sets = clock.sets(run)
    assert len({one.x.data_ptr() for one in sets}) == 3
    stats = clock.graphs({"ours": sets}, 0.0)
    assert captured == [sets]
    assert 1e-3 / 3 <= stats["ours"].median < 1e-2 / 3


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
