"""What was measured, in docs/gpu.md and in the README."""

from pathlib import Path

import pytest

from bench import cli
from bench.gpu import page
from tests.bench.gpu.lines import environment, result, status, written

ROOT = Path(__file__).parents[3]


def test_the_pages_have_what_the_results_say(monkeypatch):
    """Every device has its page, and the overviews name them all."""
    monkeypatch.chdir(ROOT)
    runs = page.committed()
    assert {run.where["device"] for run in runs} >= {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}
    for run in runs:
        assert (ROOT / "docs" / run.page).read_text("utf-8") == page.text(run)
    for name in page.OVERVIEWS:
        text = (ROOT / name).read_text("utf-8")
        between = text.partition(page.MARKS[0])[2].partition(page.MARKS[1])[0]
        assert between.strip() == page.overview(runs)


def test_committed_results_are_explained():
    folders = (ROOT / "docs" / "results").glob("gpu-*")
    names = {path.name for folder in folders for path in folder.iterdir()}
    text = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.fixture
def run(tmp_path):
    """Tables of made-up lines, as a list of the lines of each table by its title."""

    def tables(*lines):
        path = tmp_path / "run.jsonl"
        written(path, [environment("linear"), *lines])
        parts = page.text(page.Run(path)).split("\n## ")
        return parts[0], dict(part.split("\n", 1) for part in parts[1:])

    return tables


def test_losing_cases_come_first(run):
    about, tables = run(
        result("linear", "wins", 1e-5),
        result("linear", "loses", 3e-5),
        result("conv", "loses more", 4e-5, mode="train"),
        result("conv", "within noise", 2.05e-5, mode="train"),
    )
    assert about.startswith("# a GPU\n")
    assert "One a GPU: driver 580, torch 2, triton 3, Python 3, commit abc, on 20" in about
    losing = tables["Every case that loses to PyTorch's weight norm"]
    assert "2 cases are slower than eager by more than 5%" in losing
    rows = losing.splitlines()[5:]
    assert rows[:2] == [
        "| conv | loses more | train | 10 µs | 20 µs | 40 µs | 2.00 | 4.00 |",
        "| linear | loses | infer | 10 µs | 20 µs | 30 µs | 1.50 | 3.00 |",
    ]
    means = tables["Geometric means, the worst first"].splitlines()
    worst, best = means[3], means[4]
    assert worst == (
        "| conv | train | 2 | 1.43 | 1 | 2.00 (loses more) | 1.02 (within noise) | 2.86 |"
    )
    assert best.startswith("| linear | infer | 2 | 0.87 | 1 | 1.50 (loses) | 0.50 (wins) |")


def test_sections_of_several_runs(run):
    """The page names the commit of each."""
    later = environment("models", commit="def"), environment("tests", commit="def")
    about, _ = run(result("linear", "a", 1e-5), *later)
    assert "commit abc, def for models and tests, on 20" in about


def test_every_case_of_a_layer(run):
    """With its path, and a path that was faster."""
    more = {"chosen": "one_pass/materialize, keeps nothing"}
    _, tables = run(
        result("linear", "a", 4e-5, **more), result("linear", "b", 1e-5, mode="train", **more)
    )
    rows = tables["Linear layers"].splitlines()
    faster = "one_pass | scaled (0.75) | 2.00 | 4.00 | 40 µs |"
    assert f"| a | infer | 10 µs | 20 µs | 40 µs | {faster}" in rows
    assert (
        "| b | train | 10 µs | 20 µs | 10 µs | one_pass/materialize |  | 0.50 | 1.00 | 40 µs |"
        in rows
    )
    rows = tables["Measured over predicted"].splitlines()
    assert "| linear | infer |  |  | 1.00 |" in rows
    assert "| linear | train |  |  | 0.25 |" in rows


def test_the_host_with_and_without_the_library(run):
    _, tables = run(result("host", "a", 1e-5), result("host_python", "a", 3e-5))
    rows = tables["Host: the processor's time of a call"].splitlines()
    assert "| a | infer | 10 µs | 20 µs |  | 10 µs | 30 µs | 0.50 | 1.50 | 1.00 |" in rows
    _, tables = run(result("host", "a", 1e-5))
    rows = tables["Host: the processor's time of a call"].splitlines()
    assert "| a | infer | 10 µs | 20 µs |  | 10 µs |  | 0.50 |  | 1.00 |" in rows


def test_a_model_by_the_clock_and_in_a_graph(run):
    """A provider that one mode lacks leaves its cells empty."""
    graph = {name: {"median": t} for name, t in (("plain", 1e-3), ("eager", 2e-3), ("ours", 3e-3))}
    clock = {"plain": {"median": 1e-5}, "eager": {"median": 2e-5}, "ours": {"median": 1e-5}}
    frozen = {"seconds": clock | {"frozen": {"median": 5e-6}}}
    frozen["conditions"] = {"CUDA graph": graph | {"frozen": {"median": 4e-3}}}
    more = {"seconds": clock, "conditions": {"CUDA graph": graph}}
    _, tables = run(
        result("models", "m", 1e-5, mode="train", **more), result("models", "m", 1e-5, **frozen)
    )
    rows = tables["Models: HiFi-GAN's vocoder"].splitlines()
    assert (
        "| m | train | 10 µs | 20 µs | 10 µs |  | 1.00 ms | 2.00 ms | 3.00 ms |  "
        "| 0.50 |  | 1.00 |  | 1.50 |  | 3.00 |  |"
    ) in rows
    assert (
        "| m | infer | 10 µs | 20 µs | 10 µs | 5 µs | 1.00 ms | 2.00 ms | 3.00 ms | 4.00 ms "
        "| 0.50 | 0.25 | 1.00 | 0.50 | 1.50 | 2.00 | 3.00 | 4.00 |"
    ) in rows


def test_the_operator_beside_a_copy(run):
    _, tables = run(result("weight_norm", "w, float32", 1e-5, mode="forward"))
    rows = tables["weight_norm: the operator alone"].splitlines()
    assert "| w, float32 | forward | 10 µs | 20 µs | 10 µs | 0.50 | 1.00 | 4000 |" in rows


def test_other_norms_beside_l2(run):
    """They have a table and means of their own, and lose where they lose."""
    times = {"plain": 1e-5, "eager": 2e-5, "ours": 3e-5, "ours: l2": 2.5e-5}
    more = {"seconds": {name: {"median": t} for name, t in times.items()}}
    more["ratios"] = {f"ours/{name}": {"median": 3e-5 / t} for name, t in times.items()}
    case = {"label": "a", "mode": "infer", "norm": "l1"}
    _, tables = run(result("linear", "a", 1e-5), result("linear", "a", 3e-5, case=case, **more))
    rows = tables["Other norms beside l2"].splitlines()
    cells = "10 µs | 20 µs | 30 µs | 25 µs | 1.50 | 1.20 | 3.00"
    assert f"| linear | a norm l1 | infer | {cells} |" in rows
    assert tables["Linear layers"].count("| a ") == 1
    assert (
        "| linear | a norm l1 | infer |" in tables["Every case that loses to PyTorch's weight norm"]
    )
    means = tables["Geometric means, the worst first"]
    assert "| linear | infer, other norms | 1 | 1.50 |" in means
    assert "| linear | infer | 1 | 0.50 |" in means


def test_steps_by_the_clock_and_by_the_processor(run):
    processor = {name: {"median": t} for name, t in (("eager", 1e-5), ("ours", 3e-6))}
    _, tables = run(result("steps", "s", 1e-5, mode="train", conditions={"processor": processor}))
    rows = tables["Steps: recurrent layers, second derivatives and a DINO head"].splitlines()
    cells = "10 µs | 20 µs | 10 µs |  | 0.50 | 1.00 | 10 µs | 3 µs | 0.30"
    assert f"| s | train | {cells} |" in rows


def test_the_device_beside_its_data_sheet(run):
    facts = [
        {"fact": "copy, bytes/s", "value": 4.2e12, "predicted": 4.8e12},
        {"fact": "TF32 product, operations/s", "value": 4.11e14, "predicted": 4.95e14},
        {"fact": "launch, seconds", "value": 6.84e-6, "predicted": 4e-6},
        {"fact": "clocks before", "value": {"driver_version": "1"}, "predicted": None},
    ]
    _, tables = run(*({"section": "facts", "kind": "result", **fact} for fact in facts))
    rows = tables["The device"].splitlines()
    assert "| copy | 4.20 TB/s | 4.80 TB/s | 0.88 |" in rows
    assert "| TF32 product | 411 TFLOP/s | 495 TFLOP/s | 0.83 |" in rows
    assert "| launch | 6.8 µs | 4.0 µs | 1.71 |" in rows


def test_what_went_wrong_is_said(run):
    """What is wrong, what raised, what was left out and what was killed; and it is in no table."""
    wrong = result("linear", "a", 1e-5)
    del wrong["seconds"]["ours"]
    _, tables = run(
        wrong,
        {"section": "linear", "kind": "wrong", "message": "ours is wrong for a"},
        {"section": "linear", "kind": "error", "message": "b: /a/b-c/d.py:3: no" + 400 * "."},
        {"section": "conv", "kind": "left out", "cases": ["c", "d"]},
        status("conv", "FAILED, killed after 45 s"),
        {"section": "tests", "kind": "result", "test": "t", "outcome": "failed", "message": "m"},
        {"section": "tests", "kind": "result", "test": "u", "outcome": "passed"},
    )
    (title,) = tables
    assert title == "Tests and faults"
    for text in (
        "The kernels' tests: 1 failed, 1 passed.",
        "- `linear`, wrong and not timed: ours is wrong for a",
        "- `linear`, raised: b: d.py:3: no....",
        "- `conv`, left out: 2 cases",
        "- `conv`: FAILED, killed after 45 s",
        "- `t` failed: m",
    ):
        assert text in tables[title]
    assert max(map(len, tables[title].splitlines())) < 330


def test_the_overview(tmp_path):
    """It has every device and every section, the worst first, and counts the faults of each run."""
    for name, lines in {
        "one": [environment("linear"), result("linear", "a", 1e-5), result("linear", "b", 4e-5)],
        "two": [
            environment("conv", device="another"),
            result("conv", "c", 3e-5, mode="train"),
            {"section": "conv", "kind": "wrong", "message": "ours is wrong for d"},
        ],
    }.items():
        folder = tmp_path / "docs" / "results" / f"gpu-{name}"
        folder.mkdir(parents=True)
        written(folder / "results.jsonl", lines)
    text = page.overview(page.committed(tmp_path))
    rows = text.splitlines()
    better = rows.index("| linear | infer | 1.00 | 2.00 | 1 of 2 |  |  |  |")
    assert better == rows.index("| conv | train |  |  |  | 1.50 | 3.00 | 1 of 1 |") + 1
    assert "`docs/gpu-two.md` names 1 faults and gaps of its run." in rows
    assert "gpu-one.md` names" not in text


def test_publish(tmp_path, monkeypatch, capsys):
    """The command replaces what lies between the marks of the overviews, and writes the pages."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "docs" / "results" / "gpu-made-up"
    folder.mkdir(parents=True)
    written(folder / "results.jsonl", [environment("linear"), result("linear", "a", 1e-5)])
    for path in page.OVERVIEWS:
        (tmp_path / path).write_text("before\n{}\nold\n{}\nafter\n".format(*page.MARKS))
    assert cli.main(["gpu", "--publish"]) == 0
    for path in page.OVERVIEWS:
        text = (tmp_path / path).read_text("utf-8")
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert "| linear | infer | 0.50 | 1.00 | 0 of 1 |" in text
    assert "| linear | infer | 1 | 0.50 |" in (tmp_path / "docs" / "gpu-made-up.md").read_text()
    (tmp_path / "README.md").write_text("no marks")
    assert cli.main(["gpu", "--publish"]) == 1
    (folder / "results.jsonl").write_text("")
    assert cli.main(["gpu", "--publish"]) == 1
    assert "holds no results of bench gpu" in capsys.readouterr().out
    (folder / "results.jsonl").unlink()
    assert cli.main(["gpu", "--publish"]) == 1
