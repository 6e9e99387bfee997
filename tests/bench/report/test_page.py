"""Results compared, on a page, and in the docs."""

import json
import re

import pytest

from bench import cli, suite
from bench.report import page
from docs.drawings import measured
from tests.bench.layers import TINY


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
    shown = output.read_text()
    assert shown.count("<svg") == 5
    assert shown.count("class=slower") == 3
    assert "doubt (noisy)" in shown
    assert "a &lt;CPU&gt;" in shown
    assert "a copy moves 10.0 GB/s, a product does 100.0 GFLOP/s" in shown
    assert shown.count("left of 1 ours is faster") == 2
    assert shown.count("lower is better") == 4
    assert shown.count("higher is better") == 2
    case = TINY[0]
    words = f"{case.kind}({', '.join(map(str, case.arguments))}), input of shape {case.x_shape}"
    assert words in shown
    assert "http" not in re.sub(
        r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", shown, flags=re.S
    )


def test_readme_table(tmp_path, capsys):
    readme = tmp_path / "README.md"
    start, end = page.MARKS
    readme.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    path = results_of(tmp_path / "a.json", result("b", eager=0.25), result("c", eager=1.0))
    assert cli.main(["readme", path, "--file", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{start}\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert "| linear | infer | 0.50 | 0.25 (b) | 1.00 (c) | 1.10 |" in text
    assert "No case is slower than eager by more than 2 %." in text
    lost = results_of(
        tmp_path / "b.json", result("b", "train", eager=1.04), result("c", eager=1.01)
    )
    assert cli.main(["readme", path, lost, "--file", str(readme)]) == 0
    assert "Slower than eager by more than 2 %: b, train: 1.04 (1.03–1.05)." in readme.read_text()
    assert cli.main(["readme", path, "--file", str(readme), "--every-case"]) == 0
    assert "| c | infer |" in readme.read_text()
    readme.write_text("no marks")
    assert cli.main(["readme", path, "--file", str(readme)]) == 1
    assert readme.read_text() == "no marks"


@pytest.mark.parametrize(
    ("file", "table", "names"),
    [
        ("README.md", page.readme_table, ("linear", "conv", "half")),
        (
            "docs/benchmarks.md",
            page.every_case,
            ("linear", "conv", "half", "norm", "overhead", "memory"),
        ),
    ],
)
def test_the_tables_in_the_docs_were_written(file, table, names):
    """From the committed results, by the command."""
    results = [measured.CPU_RESULTS / f"{name}.json" for name in names]
    start, end = page.MARKS
    written = (measured.ROOT / file).read_text().partition(start)[2].partition(end)[0]
    assert written.strip() == table([json.loads(path.read_text()) for path in results])
