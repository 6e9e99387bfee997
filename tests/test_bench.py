"""The benchmark's own promises: nothing wrong is timed, and the reports hold what they say."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("rich")

from bench import cases, cli, suite
from bench.cases import Case, Runner
from bench.timing import interleaved, paired_ratio
from wn_kernels import WNLinear

CPU = torch.device("cpu")
TINY = [Case("4, 24, 16", "Linear", (24, 16), (4, 24), mode) for mode in cases.MODES]
CONV = [
    Case("up", "ConvTranspose1d", (4, 3, 5), (2, 4, 9), mode, {"stride": 2}, dim=1)
    for mode in cases.MODES
]


@pytest.mark.parametrize("case", TINY + CONV)
@pytest.mark.parametrize("name", cases.PROVIDERS)
def test_providers_are_right(case, name):
    Runner(case, name, CPU).check()


@pytest.mark.parametrize("case", TINY)
def test_a_wrong_provider_is_not_timed(case, monkeypatch, tmp_path):
    class Wrong(WNLinear):
        def forward(self, input):
            return 1.01 * super().forward(input)

    def make(case, layer):
        wrong = Wrong(layer.in_features, layer.out_features)
        wrong.load_state_dict(layer.state_dict())
        return wrong

    monkeypatch.setitem(cases.PROVIDERS, "ours", make)
    with pytest.raises(AssertionError, match="ours is wrong"):
        suite.run_case(case, CPU, 0.01)
    monkeypatch.setitem(cases.SUITES, "linear", [case])
    assert suite.main("linear", str(tmp_path / "r.json"), 0.01) == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert not report["results"]
    assert "ours is wrong" in report["wrong"][0]


def test_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(cases.SUITES, "linear", TINY)
    path = tmp_path / "new" / "r.json"
    assert suite.main("linear", str(path), 0.02) == 0
    report = json.loads(path.read_text())
    assert report["environment"]["backend"] == "aten"
    assert len(report["results"]) == 2
    for result in report["results"]:
        assert set(result["seconds"]) == set(cases.PROVIDERS)
        assert all(s["median"] > 0 and s["rounds"] >= 5 for s in result["seconds"].values())
        assert result["ratios"]["ours/eager"]["median"] > 0
    saved = report["results"][1]["saved_bytes"]
    weight = 24 * 16 * 4
    assert saved["eager"] >= weight > saved["ours"]
    assert saved["plain"] == 0
    assert "backend aten" in " ".join(capsys.readouterr().out.split())


def test_every_suite_has_its_command():
    assert list(cli.SUITES) == list(cases.SUITES)


def test_rounds_are_interleaved():
    """After the warm-up, each runner once a round, in rotating order."""
    order = []

    def runner(name):
        def run():
            order.append(name)
            time.sleep(6e-3)  # long enough not to be repeated inside a sample

        return run

    stats = interleaved({name: runner(name) for name in "abc"}, CPU, 0.0)
    assert "".join(order[12:]) == "abcbcacababcbca"
    assert all(len(s.data) == 5 for s in stats.values())
    ratio = paired_ratio(stats["a"], stats["b"])
    assert ratio["q1"] <= ratio["median"] <= ratio["q3"]


def test_codegen_records(tmp_path):
    """One kernel for every target, in a process of its own: this one may be interpreting."""
    path = tmp_path / "codegen.json"
    command = [sys.executable, "-m", "bench", "codegen", "--json", str(path)]
    command += ["--only", "matmul_kernel 16x32x128 .*one_pass bf16 "]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(path.read_text())
    assert {r["target"] for r in records} == {"cuda:80", "cuda:90", "cuda:100", "hip:gfx942"}
    for record in records:
        assert record["kernel"] == "matmul_kernel"
        assert record["registers"] > 0
        assert record["spill_bytes"] == 0
        assert record["shared_bytes"] > 0
        assert record["loop_instructions"] > record["tensor_core_instructions"] > 0
        assert record["stack_bytes"] >= 0
        assert record["config"]
