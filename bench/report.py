"""One self-contained HTML page of results: plots, tables with the losing cases, and where they were
measured. And the README's table, from the same files."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from bench.suite import is_slower, rows

matplotlib.use("svg")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
tr.slower { background: #fff3cd }
"""


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)


def _plot_ratios(results: list[dict[str, Any]], mode: str) -> str:
    """Ours over eager and over the plain layer, with the 95 % interval of each."""
    cases = [r for r in results if r["case"]["mode"] == mode]
    figure = Figure(figsize=(9, 0.35 * len(cases) + 1.2))
    axes = figure.subplots()
    for offset, name, color in (
        (-0.15, "ours/eager", "tab:blue"),
        (0.15, "ours/plain", "tab:gray"),
    ):
        ratios = [r["ratios"][name] for r in cases]
        medians = [x["median"] for x in ratios]
        spread = [
            [x["median"] - x["low"] for x in ratios],
            [x["high"] - x["median"] for x in ratios],
        ]
        heights = [i + offset for i in range(len(cases))]
        axes.errorbar(medians, heights, xerr=spread, fmt="o", ms=4, color=color, label=name)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    ticks = [0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(cases)), [r["case"]["label"] for r in cases])
    axes.invert_yaxis()
    axes.set_xlabel("time over that of the other (1: the same)")
    axes.set_title(mode)
    axes.legend()
    return _svg(figure)


def _plot_scaling(results: list[dict[str, Any]]) -> str:
    """Time of eager and of ours over the plain layer's, by the plain layer's own."""
    figure = Figure(figsize=(9, 4))
    for axes, mode in zip(figure.subplots(1, 2), ("infer", "train"), strict=True):
        cases = [r for r in results if r["case"]["mode"] == mode]
        cases.sort(key=lambda r: r["seconds"]["plain"]["median"])
        floor = [r["seconds"]["plain"]["median"] for r in cases]
        for name in ("eager", "ours"):
            times = [r["seconds"][name]["median"] for r in cases]
            axes.plot(
                [1e3 * t for t in floor],
                [t / f for t, f in zip(times, floor, strict=True)],
                "o-",
                ms=4,
                label=name,
            )
        axes.axhline(1, color="black", lw=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("time of the plain layer, ms")
        axes.set_title(f"{mode}: time over the plain layer's")
        axes.legend()
    return _svg(figure)


def _section(report: dict[str, Any]) -> str:
    where, header, *lines = report["environment"], *rows(report["results"])
    facts = ", ".join(f"{key} {value}" for key, value in where.items())
    parts = [f"<h2>{html.escape(report['suite'])}</h2><p>{html.escape(facts)}</p>"]
    means = "; ".join(f"{name} {value:.3f}" for name, value in report["means"].items())
    parts.append(f"<p>Geometric means: {html.escape(means)}</p>")
    parts += [_plot_ratios(report["results"], mode) for mode in ("infer", "train")]
    parts.append(_plot_scaling(report["results"]))
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    parts.append(f"<table><tr>{cells}</tr>")
    for line, result in zip(lines, report["results"], strict=True):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in line)
        parts.append(f"<tr{' class=slower' if is_slower(result) else ''}>{cells}</tr>")
    parts.append("</table><p>Highlighted: slower than eager beyond noise.</p>")
    return "\n".join(parts)


def _read(paths: list[str]) -> list[dict[str, Any]]:
    return [json.loads(Path(path).read_text("utf-8")) for path in paths]


def page(reports: list[dict[str, Any]]) -> str:
    """The whole page."""
    sections = "\n".join(map(_section, reports))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>wn_kernels</title>"
        f"<style>{STYLE}</style><body><h1>wn_kernels: benchmarks</h1>"
        "<p>Measured, interleaved, checked in float64 first. A ratio is the median over the "
        "rounds, with its 95 % interval.</p>"
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
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, float32. "
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
            eager, plain = (report["means"][f"{mode} ours/{name}"] for name in ("eager", "plain"))
            cells = (report["suite"], mode, f"{eager:.2f}", best, worst, f"{plain:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def every_case(reports: list[dict[str, Any]]) -> str:
    """A table for each suite with all its cases, as Markdown."""
    parts = []
    for report in reports:
        where = report["environment"]
        header, *lines = rows(report["results"])
        means = "; ".join(f"{name} {value:.2f}" for name, value in report["means"].items())
        parts.append(
            f"### {report['suite']}\n\n{where['device']}, {where['threads']} threads, torch "
            f"{where['torch']}, float32. Geometric means: {means}.\n"
        )
        parts += [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)]
        parts.append("")
    return "\n".join(parts).rstrip()


def readme(paths: list[str], target: str, every: bool) -> int:
    """Replaces the table between the marks of a Markdown file, by one of means or of `every` case;
    1 where it has none."""
    path = Path(target)
    text = path.read_text("utf-8")
    start, end = MARKS
    if start not in text or end not in text:
        Console().print(f"{target} has no marks {start} ... {end}")
        return 1
    before, after = text.partition(start)[0], text.partition(end)[2]
    table = (every_case if every else readme_table)(_read(paths))
    path.write_text(f"{before}{start}\n\n{table}\n\n{end}{after}", "utf-8")
    return 0
