"""One self-contained HTML page of results: plots, tables with the losing cases, and where they were
measured. And the README's table, from the same files."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import memory
from bench.gpu.results import reports as gpu_reports
from bench.layer import MODES
from bench.report import plots
from bench.report.tables import case_rows, extra_rows, is_slower, rows

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
tr.slower { background: #fff3cd }
"""


def _table(lines: list[list[str]], slower: Sequence[bool] = ()) -> str:
    header, *lines = lines
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    parts = [f"<table><tr>{cells}</tr>"]
    for i, line in enumerate(lines):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in line)
        parts.append(f"<tr{' class=slower' if slower and slower[i] else ''}>{cells}</tr>")
    return "\n".join([*parts, "</table>"])


def _fact(key: str, value: Any) -> str:
    """Returns a recorded property of a machine or of a run in words, with its unit."""
    if key == "bandwidth":
        return f"a copy moves {value / 1e9:.1f} GB/s"
    if key == "rate":
        unit, size = ("TFLOP/s", 1e12) if value >= 1e12 else ("GFLOP/s", 1e9)
        return f"a product does {value / size:.1f} {unit}"
    if key == "seconds":
        return f"{value:g} s a case"
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, dict):
        value = " ".join(f"{name}={one}" for name, one in value.items())
    return f"{key} {value}"


def _section(report: dict[str, Any]) -> str:
    suite, results = report["suite"], report["results"]
    where = report["environment"] | report["settings"] | report.get("ceilings", {})
    facts = ", ".join(_fact(key, value) for key, value in where.items())
    parts = [f"<h2>{html.escape(suite)}</h2><p>{html.escape(facts)}</p>"]
    if suite == "memory":
        parts += ["<p>KiB beyond the input and the parameters.</p>", _table(memory.rows(results))]
        return "\n".join(parts)
    means = "; ".join(f"{name} {value:.3f}" for name, value in report["means"].items())
    parts.append(f"<p>Geometric means: {html.escape(means)}</p>")
    if results[0]["case"]["mode"] in MODES:
        parts += [plots.ratios(results, mode) for mode in MODES]
        parts += [plots.by_rows(results)] if suite == "linear" else []
        parts.append(plots.by_size(results))
    counted = [r for r in results if "operations" in r["case"]]
    if counted and report["ceilings"]:
        parts.append(plots.roofline(counted, report["ceilings"]))
    parts.append(_table(rows(results), [is_slower(r) for r in results]))
    parts.append("<p>Highlighted: slower than eager beyond noise.</p>")
    meanings = case_rows(results)
    if len(meanings) > 1:
        parts.append(f"<details><summary>What the cases are</summary>{_table(meanings)}</details>")
    for title, lines in extra_rows(results).items():
        parts += [f"<h3>{html.escape(title)}</h3>", _table(lines)]
    return "\n".join(parts)


def _read(paths: list[str]) -> list[dict[str, Any]]:
    """The reports of files: one of a suite's, several of a GPU's lines."""
    found = []
    for path in map(Path, paths):
        if path.suffix == ".jsonl":
            found += gpu_reports(path)
        else:
            found.append(json.loads(path.read_text("utf-8")))
    return found


def page(reports: list[dict[str, Any]]) -> str:
    """The whole page."""
    sections = "\n".join(map(_section, reports))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>wn_kernels</title>"
        f"<style>{STYLE}</style><body><h1>wn_kernels: benchmarks</h1>"
        "<p>Every case was checked in float64 before it was timed, and all competitors ran in "
        "turn. A ratio is the median over the rounds, with its 95 % interval. "
        "<i>plain</i> is the layer without weight norm, <i>eager</i> PyTorch's weight norm.</p>"
        f"{sections}</body></html>\n"
    )


def main(paths: list[str], output: str) -> int:
    """Writes the page."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(page(_read(paths)), "utf-8")
    Console().print(f"report written to {output}")
    return 0


# --- the README's table --------------------------------------------------------------------------

MARKS = "<!-- bench: written by python -m bench readme -->", "<!-- bench: end -->"


def readme_table(reports: list[dict[str, Any]]) -> str:
    """Geometric means of each suite, and its best and worst case, as Markdown."""
    where = reports[0]["environment"]
    lines = [
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, "
        f"{reports[0]['settings']['dtype']} unless a case names another dtype. "
        "Geometric means: over eager of every case; over the plain layer of every convolution and "
        "of the linear layers of 1024 and up.",
        "",
        "| suite | mode | ours/eager | best case | worst case | ours/plain |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        for mode in ("infer", "train"):
            cases = [r for r in report["results"] if r["case"]["mode"] == mode]
            if not cases:
                continue
            cases.sort(key=lambda r: r["ratios"]["ours/eager"]["median"])
            best, worst = (
                f"{r['ratios']['ours/eager']['median']:.2f} ({r['case']['label']})"
                for r in (cases[0], cases[-1])
            )
            eager, plain = (
                f"{report['means'][key]:.2f}" if key in report["means"] else ""
                for key in (f"{mode} ours/eager", f"{mode} ours/plain")
            )
            own = report["environment"]["threads"]
            suite = report["suite"] + (f", {own} thread" if own != where["threads"] else "")
            cells = (suite, mode, eager, best, worst, plain)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", losing(reports)])


# A case is slower than eager if the median of its ratio is above this.
SLOWER = 1.02


def losing(reports: list[dict[str, Any]]) -> str:
    """Names the cases that are slower than eager, with the intervals of their ratios."""
    found = [
        (r["ratios"]["ours/eager"], f"{r['case']['label']}, {r['case']['mode']}")
        for report in reports
        for r in report["results"]
        if r["ratios"]["ours/eager"]["median"] > SLOWER
    ]
    if not found:
        return "No case is slower than eager by more than 2 %."
    found.sort(key=lambda case: -case[0]["median"])
    cases = (
        f"{words}: {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
        for ratio, words in found
    )
    return f"Slower than eager by more than 2 %: {'; '.join(cases)}."


def markdown(lines: list[list[str]]) -> str:
    """Rows as a table, the header first."""
    header, *rest = lines
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rest))


def every_case(reports: list[dict[str, Any]]) -> str:
    """The tables of each suite with all its cases, as Markdown."""
    parts = []
    for report in reports:
        where, results = report["environment"], report["results"]
        facts = f"{where['device']}, {where['threads']} threads, torch {where['torch']}"
        facts = f"### {report['suite']}\n\n{facts}, {report['settings']['dtype']}."
        if report["suite"] == "memory":
            what = "KiB of a training step, beyond the input and the parameters."
            parts += [f"{facts} {what}", markdown(memory.rows(results))]
            continue
        means = "; ".join(f"{name} {value:.2f}" for name, value in report["means"].items())
        parts += [f"{facts} Geometric means: {means}.", markdown(rows(results))]
        for title, lines in extra_rows(results).items():
            parts += [f"{title[0].upper()}{title[1:]}:", markdown(lines)]
    return "\n\n".join(parts)


def readme(paths: list[str], target: str, every: bool) -> int:
    """Replaces the table between the marks of a Markdown file, by one of means or of `every` case;
    1 where it has none."""
    table = (every_case if every else readme_table)(_read(paths))
    return replaced(Path(target), MARKS, table)


def replaced(path: Path, marks: tuple[str, str], table: str) -> int:
    """Puts `table` between the marks of a file; 1 where it has none."""
    text = path.read_text("utf-8")
    start, end = marks
    if start not in text or end not in text:
        Console().print(f"{path} has no marks {start} ... {end}")
        return 1
    before, after = text.partition(start)[0], text.partition(end)[2]
    path.write_text(f"{before}{start}\n\n{table}\n\n{end}{after}", "utf-8")
    return 0
