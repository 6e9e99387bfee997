"""Nothing wrong is timed, and each suite leaves the results that it says."""

import dataclasses
import json

import pytest
import torch

from bench import cases, cli, memory, overhead, suite, tuned
from bench.cases import Case
from bench.measure import allocation
from bench.providers import PROVIDERS, Provider
from tests.bench.layers import CONV, CPU, QUICK, TINY
from wn_kernels import WNLinear, plan
from wn_kernels.tuning import Tuned


@pytest.mark.parametrize("case", TINY)
def test_a_wrong_provider_is_not_timed(case, monkeypatch, tmp_path):
    class Wrong(WNLinear):
        def forward(self, input):
            return 1.01 * super().forward(input)

    def make(case, layer):
        wrong = Wrong(layer.in_features, layer.out_features)
        wrong.load_state_dict(layer.state_dict())
        return wrong

    monkeypatch.setitem(PROVIDERS, "ours", Provider(make))
    with pytest.raises(AssertionError, match="ours is wrong"):
        suite.run_case(case, CPU, 0.01)
    monkeypatch.setitem(cases.SUITES, "linear", [case])
    assert suite.main("linear", str(tmp_path / "r.json"), 0.01) == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert not report["results"]
    assert "ours is wrong" in report["wrong"][0]
    if case.mode == "train":
        monkeypatch.setattr(memory, "SUITES", {"linear": [case]})
        assert memory.main(str(tmp_path / "m.json"), full=False) == 1
        assert not json.loads((tmp_path / "m.json").read_text())["results"]


def test_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(cases.SUITES, "linear", TINY)
    path = tmp_path / "new" / "r.json"
    assert suite.main("linear", str(path), 0.02) == 0
    report = json.loads(path.read_text())
    assert report["environment"]["backend"] == plan.serving(torch.empty(0))
    assert report["ceilings"]["bandwidth"] > 1e8
    assert report["ceilings"]["rate"] > 1e8
    assert len(report["results"]) == 2
    for result in report["results"]:
        assert list(result["seconds"]) == QUICK
        assert all(s["median"] > 0 and s["rounds"] >= 5 for s in result["seconds"].values())
        assert result["ratios"]["ours/eager"]["median"] > 0
    saved = report["results"][1]["saved_bytes"]
    weight = 24 * 16 * 4
    assert saved["eager"] >= weight > saved["ours"]
    assert saved["plain"] == 0
    backend = plan.serving(torch.empty(0))
    assert f"backend {backend}" in " ".join(capsys.readouterr().out.split())


def test_a_full_run(monkeypatch, tmp_path, capsys):
    """Every path of ours has its line, in the terminal and on the page."""
    monkeypatch.setitem(cases.SUITES, "conv", CONV)
    monkeypatch.setitem(
        PROVIDERS, "compiled", dataclasses.replace(PROVIDERS["eager"], full=True)
    )  # a compiler takes its time
    path = tmp_path / "r.json"
    assert suite.main("conv", str(path), 0.02, full=True) == 0
    report = json.loads(path.read_text())
    assert report["settings"]["full"]
    seconds = report["results"][0]["seconds"]
    assert {*QUICK, "compiled", "ours: aten, materialize/materialize"} < set(seconds)
    assert "ours by every path" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert cli.main(["report", str(path), "--output", str(page)]) == 0
    assert "<td>aten, materialize/materialize</td>" in page.read_text()


def test_memory(monkeypatch, tmp_path):
    """The most that a run holds at once, and the weight that eager holds and ours does not."""

    def run():
        first = torch.empty(1 << 20)
        second = torch.empty(1 << 18)
        del first
        third = torch.empty(1 << 18)
        del second, third

    assert allocation.peak_bytes(run, CPU) == 4 * (1 << 20) + 4 * (1 << 18)
    large = [Case("8, 256, 256", "Linear", (256, 256), (8, 256), mode) for mode in cases.MODES]
    monkeypatch.setattr(memory, "SUITES", {"linear": large})
    path = tmp_path / "m.json"
    assert memory.main(str(path), full=False) == 0
    (found,) = json.loads(path.read_text())["results"]
    weight = 4 * 256 * 256
    saved, peak = found["saved_bytes"], found["peak_bytes"]
    assert saved["plain"] == 0
    assert saved["ours"] < weight < saved["eager"]
    assert peak["plain"] + weight <= peak["eager"]
    page = tmp_path / "page.html"
    assert cli.main(["report", str(path), "--output", str(page)]) == 0
    assert "<td>8, 256, 256</td>" in page.read_text()


def test_overhead(monkeypatch, tmp_path):
    """The places that a call passes through, and no more time than it takes."""
    monkeypatch.setattr(overhead, "CASES", overhead.CASES[:2])
    monkeypatch.setattr(overhead, "CALLS", 20)
    path = tmp_path / "o.json"
    assert suite.main("overhead", str(path), 0.02) == 0
    for result in json.loads(path.read_text())["results"]:
        for name, places in result["microseconds"].items():
            total = 1e6 * result["seconds"][name]["median"]
            assert round(sum(places.values()) / total, 6) == 1
            assert ("functional" in places) == (name == "ours")
    page = tmp_path / "page.html"
    assert cli.main(["report", str(path), "--output", str(page)]) == 0
    assert "by place" in page.read_text()


def test_every_suite_has_its_command():
    assert list(cli.SUITES) == list(cases.SUITES)
    for name in cli.SUITES | cli.MORE:
        assert suite.cases_of(name)


@pytest.mark.usefixtures("own_table")
def test_tuned(monkeypatch, tmp_path, capsys):
    """It counts defaults that are close, and keeps away from the user's table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuned, "SUITES", {"linear": TINY, "conv": CONV})
    code = tuned.main(0.05)
    out = capsys.readouterr().out
    assert "of 2 defaults are within 10 % of the fastest" in out
    assert code == (0 if "2 of 2 defaults" in out else 1)
    assert (tmp_path / "results" / "tuned.json").exists()


def test_without_git(monkeypatch, tmp_path):
    """Where it is not installed, and outside of a repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WN_KERNELS_COMMIT", raising=False)
    assert suite.commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert suite.commit() == "unknown"
    monkeypatch.setenv("WN_KERNELS_COMMIT", "abc1234")
    assert suite.commit() == "abc1234"


def test_where_a_run_was_made(monkeypatch):
    """With the native library or without it."""
    for reason in (None, "it was not built"):
        monkeypatch.setattr(suite.native, "unavailable", lambda reason=reason: reason)
        assert suite.environment(CPU)["native"] is (reason is None)
    assert "driver" not in suite.environment(CPU)


def test_the_driver_s_version(monkeypatch, tmp_path):
    """By its tool, whatever becomes of that."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for script, version in (("echo 580.1; echo 580.1", "580.1"), ("exit 9", None), ("", None)):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert suite.driver() == version
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert suite.driver() is None


def test_loss_of_a_default():
    one, two, other = (plan.Plan("aten", *names) for names in ("aa", "ab", "bb"))
    line = Tuned("call", "aten", {one: 1.2, two: 1.0, "a": 0.1}, one, two)
    assert tuned.loss(line) == 1.2
    assert tuned.loss(dataclasses.replace(line, default=other)) == 1.0
