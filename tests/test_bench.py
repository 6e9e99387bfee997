"""The benchmark's own promises: nothing wrong is timed, and the reports hold what they say."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.stats import Stats

pytest.importorskip("rich")

from bench import cases, cli, gpu, norms, report, suite, tuned
from bench.cases import Case, Runner
from bench.timing import interleaved, is_wide, paired_ratio
from wn_kernels import WNLinear, plan
from wn_kernels.tuning import Tuned

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
    for name in cli.SUITES | cli.MORE:
        assert suite.cases_of(name)


NORMS = [
    norms.NormCase(shape, dim, mode)
    for shape, dim in [((6, 5), 0), ((6, 5), 1), ((3, 4, 5), 1), ((4, 6), None)]
    for mode in cases.MODES
]


@pytest.mark.parametrize("case", NORMS)
def test_norms_are_checked(case, monkeypatch):
    for name in case.providers:
        runner = case.runner(name, CPU)
        runner.check()
        runner()
    monkeypatch.setitem(norms.PROVIDERS, "ours", lambda v, g, dim: 1.1 * v * g)
    with pytest.raises(AssertionError, match="ours is wrong"):
        case.runner("ours", CPU).check()


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


def bounds_of(*arguments):
    """Compiled in a process of its own: this one may be interpreting."""
    code = f"""
import json
from bench import bounds
found = bounds.bounds({", ".join(arguments)})
print(json.dumps([[t.name, form, b.name, b.record.loop_instructions] for t, _, form, b in found]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_a_small_batch_is_bound_by_memory():
    """On every target, in one pass: the norm in the loop hides behind the bytes of V."""
    pytest.importorskip("triton")
    found = bounds_of("[bounds.TILES[1]]", "('one_pass',)")
    assert len(found) == 4
    for target, _, name, instructions in found:
        assert name == "memory", target
        assert instructions > 0


def test_ready_norms_cost_the_loop_nothing():
    """The scaled form's loop is a plain matmul's, to 5 %, at the tile of large batches."""
    pytest.importorskip("triton")
    found = bounds_of("[bounds.TILES[3]]", "('plain', 'epilogue')")
    counts = {(target, form): instructions for target, form, _, instructions in found}
    for target in {target for target, _ in counts}:
        assert counts[target, "epilogue"] <= 1.05 * counts[target, "plain"]


# --- results -------------------------------------------------------------------------------------


def result(label="a", mode="infer", eager=0.5, plain=1.1, spread=0.01, noisy=False):
    ratios = {"ours/eager": eager, "ours/plain": plain}
    return {
        "case": {"label": label, "mode": mode, "is_large": True},
        "seconds": {name: {"median": 1e-3} for name in ("plain", "eager", "ours")},
        "ratios": {
            name: {"median": r, "q1": r, "q3": r, "low": r - spread, "high": r + spread}
            for name, r in ratios.items()
        },
        "noisy": noisy,
        "saved_bytes": {},
    }


def results_of(path, *found):
    where = {"device": "a <CPU>", "threads": 2, "torch": "2.13.0", "commit": "abc"}
    means = suite.geometric_means(list(found))
    report = {"suite": "linear", "environment": where, "results": found, "means": means}
    path.write_text(json.dumps(report))
    return str(path)


@pytest.mark.parametrize(
    ("eager", "spread", "code", "said"),
    [
        (0.5, 0.01, 0, "0 ratios moved"),
        (0.6, 0.01, 1, "1 of them to the worse"),
        (0.6, 0.12, 0, "0 ratios moved"),  # the intervals overlap
        (0.515, 0.001, 0, "0 ratios moved"),  # apart, but by less than runs differ
        (0.4, 0.01, 0, "1 ratios moved, 0 of them to the worse"),
    ],
)
def test_compare(eager, spread, code, said, tmp_path, capsys):
    before = results_of(tmp_path / "a.json", result())
    after = results_of(tmp_path / "b.json", result(eager=eager, spread=spread))
    assert cli.main(["compare", before, after]) == code
    assert said in capsys.readouterr().out


def test_compare_of_several_runs(tmp_path, capsys):
    """Their intervals are joined: what differs between two of them is noise."""
    runs = {
        name: results_of(tmp_path / name, result(eager=e))
        for name, e in zip("abc", (0.5, 0.6, 0.8), strict=True)
    }
    assert cli.main(["compare", f"{runs['a']},{runs['b']}", runs["b"]]) == 0
    assert cli.main(["compare", f"{runs['a']},{runs['b']}", runs["c"]]) == 1
    assert "0.55" in capsys.readouterr().out


def test_compare_misses_what_is_gone(tmp_path, capsys):
    before = results_of(tmp_path / "a.json", result(), result("b"))
    after = results_of(tmp_path / "b.json", result())
    assert cli.main(["compare", before, after]) == 1
    assert "gone: b infer" in capsys.readouterr().out


def test_report_page(tmp_path):
    """One file, with everything in it and the losing case marked."""
    found = [
        result(label, mode, eager)
        for label, eager in (("wins", 0.5), ("loses", 1.2))
        for mode in ("infer", "train")
    ]
    path = results_of(tmp_path / "a.json", *found, result("doubt", "train", 1.2, noisy=True))
    output = tmp_path / "page.html"
    assert cli.main(["report", path, "--output", str(output)]) == 0
    page = output.read_text()
    assert page.count("<svg") == 3
    assert page.count("class=slower") == 3
    assert "doubt (noisy)" in page
    assert "a &lt;CPU&gt;" in page
    assert "http" not in re.sub(
        r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", page, flags=re.S
    )


def test_readme_table(tmp_path, capsys):
    readme = tmp_path / "README.md"
    start, end = report.MARKS
    readme.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    path = results_of(tmp_path / "a.json", result("b", eager=0.25), result("c", eager=1.0))
    assert cli.main(["readme", path, "--file", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{start}\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert "| linear | infer | 0.50 | 0.25 (b) | 1.00 (c) | 1.10 |" in text
    assert cli.main(["readme", path, "--file", str(readme), "--every-case"]) == 0
    assert "| c | infer |" in readme.read_text()
    readme.write_text("no marks")
    assert cli.main(["readme", path, "--file", str(readme)]) == 1
    assert readme.read_text() == "no marks"


@pytest.mark.parametrize(
    ("file", "table", "names"),
    [
        ("README.md", report.readme_table, ("linear", "conv")),
        ("docs/benchmarks.md", report.every_case, ("linear", "conv", "norm")),
    ],
)
def test_the_tables_in_the_docs_were_written(file, table, names):
    """From the committed results, by the command."""
    root = Path(__file__).parents[1]
    results = [root / "docs" / "results" / f"{name}.json" for name in names]
    start, end = report.MARKS
    written = (root / file).read_text().partition(start)[2].partition(end)[0]
    assert written.strip() == table([json.loads(path.read_text()) for path in results])


def test_interval_of_a_ratio():
    """It holds the median, and shrinks with the rounds."""
    stats = {name: Stats() for name in "ab"}
    for i in range(8):
        stats["a"].update(1.0 + 0.1 * (i % 2))
        stats["b"].update(1.0)
    few = paired_ratio(stats["a"], stats["b"])
    assert few["low"] <= few["median"] <= few["high"]
    assert is_wide({"low": 0.9, "high": 1.1, "median": 1.0})
    assert not is_wide({"low": 0.98, "high": 1.02, "median": 1.0})


# --- a GPU at hand -------------------------------------------------------------------------------


def test_gpu_without_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gpu"]) == 1
    assert "there is no GPU here" in capsys.readouterr().out


def test_gpu_says_what_failed(monkeypatch, capsys):
    """Every step runs, whatever became of those before it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    steps = [
        gpu.Step("fails", ("-c", "raise SystemExit(3)"), 60),
        gpu.Step("hangs", ("-c", "import time; time.sleep(60)"), 0.5),
        gpu.Step("passes", ("-c", "pass"), 60),
    ]
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.main() == 1
    out = " ".join(capsys.readouterr().out.split())
    for said in ("exit code 3", "not done after 0 s", "passed"):
        assert said in out
    monkeypatch.setattr(gpu, "STEPS", steps[2:])
    assert gpu.main() == 0
    assert sum(step.limit for step in gpu.STEPS) <= 900


def test_the_steps_of_a_gpu_are_commands():
    """Each names a command that there is, and fifteen minutes hold them all."""
    assert sum(step.limit for step in gpu.STEPS) <= 900
    for step in gpu.STEPS:
        if step.arguments[1] == "bench":
            parsed = [*step.arguments[2:3], "--help"]
            with pytest.raises(SystemExit, match="0"):
                cli.main(parsed)
    net, x = gpu.layers()
    assert net(x).shape == (16, 1024)


# --- the cost model ------------------------------------------------------------------------------


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


def test_loss_of_a_default():
    steps = {plan.Path("a", "a"): 1.2, plan.Path("a", "b"): 1.0, "a": 0.1}
    line = Tuned("call", "aten", steps, plan.Path("a", "a"), plan.Path("a", "b"))
    assert tuned.loss(line) == 1.2
    assert tuned.loss(dataclasses.replace(line, default=plan.Path("b", "b"))) == 1.0
