"""The table at the end has at most sixty lines, the losing cases first."""

from __future__ import annotations

from collections.abc import Callable
from statistics import geometric_mean
from typing import Any

from bench.gpu.results import TIMED, Line, is_other_norm, median, mode_of, of, words_of
from bench.gpu.sections import SECTIONS, Section
from bench.providers import NORM_L2, VARIANT
from bench.report.tables import rates_of, time_of

LINES = 60
WIDTH = 150


def table(lines: list[Line]) -> str:
    """Returns the whole table."""
    text = [_title(lines)]
    for section in SECTIONS:
        if of(lines, section.name, "environment") or of(lines, section.name, "status"):
            text += _section(section, lines)
    return "\n".join(line[:WIDTH] for line in text[:LINES]) + "\n"


def _title(lines: list[Line]) -> str:
    for line in lines:
        if line["kind"] == "environment":
            where = line["environment"]
            versions = f"torch {where['torch']}, triton {where['triton']}, {where['commit']}"
            if line["settings"]["dry_run"]:
                return f"DRY RUN on the processor, nothing is measured: {versions}"
            return f"{where['device']}: {versions}; predictions in parentheses"
    return "nothing was run"


def _section(section: Section, lines: list[Line]) -> list[str]:
    """Returns a section's outcome, then what it found, in as many lines as it may take."""
    status = of(lines, section.name, "status")
    said = f"{status[-1]['outcome']}, {status[-1]['seconds']:.0f} s" if status else "not done"
    faults = [
        line["message"] for kind in ("wrong", "error") for line in of(lines, section.name, kind)
    ]
    left = sum(len(line["cases"]) for line in of(lines, section.name, "left out"))
    words = [said, *([f"{left} cases left out"] if left else [])]
    words += [f"{len(faults)} faults"] if faults else []
    words += [f"{status[-1]['compiled']} kernels compiled"] if status else []
    rows = faults[:2] + ROWS[section.name](of(lines, section.name))
    kept = rows[: section.lines - 1]
    return [f"{section.name}: {', '.join(words)}", *(f"  {row}" for row in kept)]


def _facts(found: list[Line]) -> list[str]:
    rows = []
    for line in found:
        value, predicted = line.get("value"), line["predicted"]
        if isinstance(value, float) and predicted:
            rows.append(f"{line['fact']}: {value:.3g} ({predicted:.3g})")
    half = (len(rows) + 1) // 2
    return ["; ".join(rows[i::half]) for i in range(half)] if rows else []


def _tests(found: list[Line]) -> list[str]:
    counts: dict[str, int] = {}
    for line in found:
        counts[line["outcome"]] = counts.get(line["outcome"], 0) + 1
    failed = [line for line in found if line["outcome"] == "failed"]
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    return [said, *(f"{line['test']}: {line['message']}" for line in failed)]


def _loss(line: Line) -> float:
    """Returns the time of ours over eager's. Where ours is missing the case counts as the worst."""
    times = line["seconds"]
    if "ours" not in times:
        return float("inf")
    return median(line, "ours") / median(line, "eager") if "eager" in times else 1.0


def _mean(lines: list[Line], other: str) -> str:
    ratios = [
        median(line, "ours") / median(line, other)
        for line in lines
        if {"ours", other} <= line["seconds"].keys()
    ]
    return f"{geometric_mean(ratios):.2f}" if ratios else "none"


def _means(lines: list[Line]) -> str:
    """Returns the means of ours over the others, also over ours of l2 and by the processor if these
    were timed."""
    others = ["plain", "eager", *([NORM_L2] if is_other_norm(lines[0]["case"]) else [])]
    means = ", ".join(
        f"ours/{other.removeprefix(VARIANT)} {_mean(lines, other)}" for other in others
    )
    if "processor" in lines[0].get("conditions", {}):
        processor = [line | {"seconds": line["conditions"]["processor"]} for line in lines]
        means += f"; by the processor ours/eager {_mean(processor, 'eager')}"
    return means


def _times(found: list[Line]) -> list[str]:
    """Returns the means of each mode, then a line for each case, the losing ones first."""
    rows = []
    for mode in dict.fromkeys(mode_of(line["case"]) for line in found):
        of_mode = [line for line in found if mode_of(line["case"]) == mode]
        rows.append(f"{mode}, {len(of_mode)} cases, geometric means: {_means(of_mode)}")
    return rows + [_case(line) for line in sorted(found, key=_loss, reverse=True)]


def _case(line: Line) -> str:
    case, times = line["case"], line["seconds"]
    label, *kind = words_of(case)
    about = [label, case["mode"], *kind]
    figures = [_figure(line, name) for name in ("ours", "plain", "eager") if name in times]
    paths = [name for name in times if name.startswith(VARIANT)]
    if paths:
        fastest = min(paths, key=lambda name: median(line, name))
        figures.append(_figure(line, fastest))
    if "bytes" in case and "ours" in times:
        figures.append(f"ours {rates_of(line, 'ours')}")
    return f"{' '.join(about)}: {', '.join(figures)}"


def _figure(line: Line, name: str) -> str:
    predicted = line["predicted"].get(name)
    expected = f" ({time_of(predicted)})" if predicted else ""
    return f"{name.removeprefix(VARIANT)} {time_of(median(line, name))}{expected}"


def _sweeps(found: list[Line]) -> list[str]:
    """Returns the fastest configuration of each kernel beside the shipped one."""
    rows = []
    for line in found:
        times = line["seconds"]
        if "shipped" in times:
            best = min(times, key=lambda name: median(line, name))
            gain = median(line, "shipped") / median(line, best)
            shipped = _figure(line, "shipped")
            rows.append((gain, f"{line['case']['label']}: {shipped}, {best} {gain:.2f} of it"))
    return [text for _, text in sorted(rows, reverse=True)]


ROWS: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "facts": _facts,
    "tests": _tests,
    "sweep": _sweeps,
    **dict.fromkeys(TIMED, _times),
}
