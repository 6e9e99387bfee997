"""The benchmark's own promises: nothing wrong is timed, and the reports hold what they say."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from pytest_benchmark.stats import Stats

pytest.importorskip("rich")

from bench import allocation, cases, cli, gpu, memory, norms, overhead, report, suite, timing, tuned
from bench.cases import Case
from bench.providers import PROVIDERS, Provider, variants
from bench.timing import interleaved, is_wide, paired_ratio
from wn_kernels import WNLinear, plan, tuning
from wn_kernels.tuning import Tuned

CPU = torch.device("cpu")
TINY = [Case("4, 24, 16", "Linear", (24, 16), (4, 24), mode) for mode in cases.MODES]
CONV = [
    Case("up", "ConvTranspose1d", (4, 3, 5), (2, 4, 9), mode, {"stride": 2}, dim=1)
    for mode in cases.MODES
]


QUICK = [name for name, provider in PROVIDERS.items() if provider.competes(CPU, full=False)]


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
    assert {"ours: reference", "ours: aten, materialize/materialize"} < set(found)
    for name in found:
        runner = case.competitors(CPU, full=True)[name]()
        with runner.session():
            runner.check()
            if name != "ours: reference":
                with plan.watching() as calls:
                    runner()
                served = {plan.choose(*call) for call in calls}
                assert {f"ours: aten, {tuning.name_of(choice)}" for choice in served} <= {name}
    assert not plan._fixed
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
    assert report["environment"]["backend"] == "aten"
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
    assert "backend aten" in " ".join(capsys.readouterr().out.split())


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


def test_a_gpu_is_timed_by_events(monkeypatch):
    """Warm, with the cache cleared before each call, and replayed: on a stand-in for a GPU whose
    clock ticks once an operation."""
    clock, log = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def elapsed_time(self, end):
            return end.time - self.time

    class Graph:
        def replay(self):
            log.append("replay")

    class Block(contextlib.nullcontext):
        def wait_stream(self, other):
            log.append("wait")

    class Buffer:
        def zero_(self):
            log.append("clear")
            clock[0] += 100

    def run():
        log.append("run")
        clock[0] += 1

    stand_in = types.SimpleNamespace(
        Event=Event,
        CUDAGraph=Graph,
        Stream=Block,
        stream=Block,
        graph=Block,
        current_stream=Block,
        synchronize=lambda device: None,
        get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=1 << 20),
    )
    monkeypatch.setattr(timing.torch, "cuda", stand_in)
    monkeypatch.setattr(timing.torch, "empty", lambda *size, **options: Buffer())
    device = torch.device("cuda")
    assert round(timing.warm(run, 5, device), 6) == 5e-3
    log.clear()
    assert round(timing.cold(run, 3, device), 6) == 3e-3  # without the time of clearing
    assert log == ["clear", "run"] * 3
    log.clear()
    timing.replayed(run)()
    assert log == ["wait", "run", "run", "run", "wait", "run", "replay"]


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
    for build in case.competitors(CPU, full=False).values():
        runner = build()
        runner.check()
        runner()
    monkeypatch.setitem(norms.PROVIDERS, "ours", lambda v, g, dim: 1.1 * v * g)
    with pytest.raises(AssertionError, match="ours is wrong"):
        case.competitors(CPU, full=False)["ours"]().check()


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


def bounds_of(tiles, *names):
    """By target, `(form, bound, issue cycles, record)`; compiled in a process of its own: this one
    may be interpreting. `tiles` is an expression."""
    code = f"""
import json
from dataclasses import asdict
from bench import bounds
from wn_kernels.backends.triton import configs

def shipped(function, *arguments):
    return [bounds.Tile(*function(*arguments))]

found = {{}}
for target in bounds.TARGETS:
    with configs.architecture(target.name):
        tiles = {tiles}
    found[target.name] = [
        (form, bound.name, bound.issue, asdict(record))
        for _, _, form, record, bound in bounds.forms(tiles, {names}, [target])
    ]
print(json.dumps(found))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_a_small_batch_is_bound_by_memory():
    """On every target, in one pass: the norm in the loop hides behind the bytes of V."""
    pytest.importorskip("triton")
    found = bounds_of("shipped(configs.one_pass, 16, 8192, 2)", "one_pass")
    assert len(found) == 4
    for target, ((_, name, _, record),) in found.items():
        assert name == "memory", target
        assert record["spill_bytes"] == 0
        assert record["loop_instructions"] > 0


def test_ready_norms_cost_the_loop_nothing():
    """The scaled form's loop is a plain matmul's, to 5 %, at the tile of large batches."""
    pytest.importorskip("triton")
    tiles = "shipped(configs.matmul, 4096, 4096, 2, False, False, configs.may_copy(4096, 2))"
    for target, found in bounds_of(tiles, "plain", "epilogue").items():
        counts = {form: record["loop_instructions"] for form, _, _, record in found}
        copies = target in ("cuda:90", "cuda:100")
        assert ("epilogue, descriptors" in counts) == copies
        for how in (", descriptors", "") if copies else ("",):
            assert counts[f"epilogue{how}"] <= 1.05 * counts[f"plain{how}"], target


def test_hardware_copies_the_tiles_of_large_batches():
    """On Hopper and Blackwell: copies of tiles in the loop, beside tensor cores that read them from
    shared memory, for fewer instructions than by pointers."""
    pytest.importorskip("triton")
    tiles = "shipped(configs.matmul, 4096, 4096, 2, True, False, configs.may_copy(4096, 2))"
    found = bounds_of(tiles, "prologue_r")
    for target, loads in (("cuda:90", "descriptors"), ("cuda:100", "specialized")):
        forms = {form: (issue, record) for form, _, issue, record in found[target]}
        issue, record = forms[f"prologue_r, {loads}"]
        assert record["mix"]["tile copy"] == 2
        assert record["tensor_core_instructions"] > 0
        assert record["spill_bytes"] == 0
        assert issue < forms["prologue_r"][0]
    for target in ("cuda:80", "hip:gfx942"):
        assert [form for form, *_ in found[target]] == ["prologue_r"]


# --- results -------------------------------------------------------------------------------------


def result(label="a", mode="infer", eager=0.5, plain=1.1, spread=0.01, noisy=False):
    ratios = {"ours/eager": eager, "ours/plain": plain}
    return {
        "case": TINY[mode == "train"].record() | {"label": label},
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
    report |= {"settings": {"dtype": "float32"}, "ceilings": {"bandwidth": 1e10, "rate": 1e11}}
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
    assert page.count("<svg") == 5
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
        (
            "docs/benchmarks.md",
            report.every_case,
            ("linear", "conv", "norm", "overhead", "memory"),
        ),
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
