"""The tables of docs/gpu.md and of the README are made from the JSON lines of a run.

The losing cases come first everywhere. Every figure is read from the JSON lines of a run, whose
path the tables name.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from bench.gpu.results import COPY, READ, TIMED, Line, median, of, read, words_of
from bench.providers import VARIANT
from bench.report import markdown, replaced
from bench.tables import NOISE, time_of

MARKS = (
    "<!-- results: written by python -m bench gpu --publish -->",
    "<!-- results: end -->",
)
README_MARKS = (
    "<!-- gpu: written by python -m bench gpu --publish -->",
    "<!-- gpu: end -->",
)

# Characters of a message.
LONGEST = 300

Rows = list[list[str]]


class Run:
    """The lines of a run, and what several tables need of them.

    Attributes:
        path: the file, as the tables name it.
        lines: all lines.
        where: the environment of the first section.
    """

    def __init__(self, path: str) -> None:
        self.path, self.lines = path, read(Path(path))
        environments = [line for line in self.lines if line["kind"] == "environment"]
        self.where: dict[str, Any] = environments[0]["environment"]

    def results(self, section: str) -> list[Line]:
        """Returns the cases of a section in which ours, plain and eager are right. Those that lose
        the most to eager come first."""
        providers = {"ours", "plain", "eager"}
        found = [x for x in of(self.lines, section) if providers <= x["seconds"].keys()]
        return sorted(found, key=lambda line: over(line, "eager"), reverse=True)

    def fact(self, name: str) -> Any:
        """Returns what was measured of the device, or `None` if it was not."""
        return next((x["value"] for x in of(self.lines, "facts") if x["fact"] == name), None)


def over(line: Line, other: str) -> float:
    """Returns the median of the ratios of ours to another provider."""
    return line["ratios"][f"ours/{other}"]["median"]


def _ratio(line: Line, other: str) -> str:
    return f"{over(line, other):.2f}"


def _case(line: Line) -> list[str]:
    return [" ".join(words_of(line["case"])), line["case"]["mode"]]


def _time(line: Line, name: str) -> str:
    return time_of(median(line, name)) if name in line["seconds"] else ""


def _where(run: Run) -> str:
    """Returns sentences that name the device, the versions and the file."""
    where, clocks = run.where, run.fact("clocks before") or {}
    driver = where.get("driver") or clocks.get("driver_version", "unknown")
    cudnn = (run.fact("device") or {}).get("cuDNN")
    cudnn = f", cuDNN {cudnn}" if cudnn else ""
    return (
        f"One {where['device']}: driver {driver}, torch {where['torch']}{cudnn}, triton "
        f"{where['triton']}, Python {where['python']}, commit {where['commit']}, on "
        f"{where['time'][:10]}. All figures are those of `{run.path}`."
    )


def _summary(run: Run) -> Rows:
    """Returns geometric means of each section and mode, the worst first."""
    found = []
    for section in TIMED:
        lines = run.results(section)
        for mode in dict.fromkeys(line["case"]["mode"] for line in lines):
            some = [line for line in lines if line["case"]["mode"] == mode]
            eager, plain = (
                geometric_mean(over(line, other) for line in some) for other in ("eager", "plain")
            )
            worst, best = (f"{_ratio(x, 'eager')} ({_case(x)[0]})" for x in (some[0], some[-1]))
            slower = sum(over(line, "eager") > NOISE for line in some)
            cells = [section, mode, str(len(some)), f"{eager:.2f}", str(slower), worst, best]
            found.append((eager, [*cells, f"{plain:.2f}"]))
    header = ["section", "mode", "cases", "ours/eager", "slower than eager"]
    header += ["worst case", "best case", "ours/plain"]
    return [header, *(row for _, row in sorted(found, key=lambda row: row[0], reverse=True))]


def _losing(run: Run) -> Rows:
    """Returns the cases that are slower than PyTorch's weight norm by more than noise."""
    rows = [["section", "case", "mode", "plain", "eager", "ours", "ours/eager", "ours/plain"]]
    found = [
        (over(line, "eager"), section, line)
        for section in TIMED
        for line in run.results(section)
        if over(line, "eager") > NOISE
    ]
    for _, section, line in sorted(found, key=lambda x: x[0], reverse=True):
        times = (_time(line, name) for name in ("plain", "eager", "ours"))
        ratios = (_ratio(line, other) for other in ("eager", "plain"))
        rows.append([section, *_case(line), *times, *ratios])
    return rows


def _faults(run: Run) -> list[str]:
    """Returns the items of a list: what was wrong, what raised and what was left out."""
    items = []
    for kind, said in (("wrong", "wrong and not timed"), ("error", "raised")):
        lines = [line for line in run.lines if line["kind"] == kind]
        items += [f"- `{line['section']}`, {said}: {_brief(line['message'])}" for line in lines]
    for line in run.lines:
        if line["kind"] == "left out":
            items.append(f"- `{line['section']}`, left out: {len(line['cases'])} cases")
        elif line["kind"] == "status" and "killed" in line["outcome"]:
            items.append(f"- `{line['section']}`: {line['outcome']}")
    for line in of(run.lines, "tests"):
        if line["outcome"] == "failed":
            items.append(f"- `{line['test']}` failed: {_brief(line['message'])}")
    return list(dict.fromkeys(items))


def _brief(message: str) -> str:
    """Returns a message of at most `LONGEST` characters, in which files have no folders."""
    message = re.sub(r"(?<!\w)(/[\w.+-]+)+/", "", message)
    return message if len(message) <= LONGEST else f"{message[: LONGEST - 1]}…"


def _tests(run: Run) -> str:
    outcomes = [line["outcome"] for line in of(run.lines, "tests")]
    counts = {name: outcomes.count(name) for name in dict.fromkeys(outcomes)}
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _facts(run: Run) -> Rows:
    """Returns what was measured of the device beside what the cost model has."""
    units = {COPY: (1e12, "TB/s"), READ: (1e12, "TB/s")}
    rows = [["", "measured", "in the cost model", "measured/model"]]
    for line in of(run.lines, "facts"):
        value, predicted = line["value"], line["predicted"]
        if not isinstance(value, float) or not predicted:
            continue
        name = line["fact"].partition(",")[0]
        if line["fact"].endswith("seconds"):
            cells = [f"{seconds * 1e6:.1f} µs" for seconds in (value, predicted)]
        else:
            scale, unit = units.get(line["fact"], (1e12, "TFLOP/s"))
            digits = 2 if unit == "TB/s" else 0
            cells = [f"{amount / scale:.{digits}f} {unit}" for amount in (value, predicted)]
        rows.append([name, *cells, f"{value / predicted:.2f}"])
    return rows


def _host(run: Run) -> Rows:
    """Returns the processor's times with and without the native library. A ratio that does not name
    the library is one with it."""
    without = {tuple(_case(line)): line for line in run.results("host_python")}
    names = ["plain", "eager", "legacy"]
    header = ["case", "mode", *names, "ours", "ours, no library", "ours/eager", "no library/eager"]
    rows = [[*header, "ours/plain"]]
    for line in run.results("host"):
        other = without.get(tuple(_case(line)))
        times = [_time(line, name) for name in (*names, "ours")]
        beside = [_time(other, "ours"), _ratio(other, "eager")] if other else ["", ""]
        ratios = [_ratio(line, "eager"), beside[1], _ratio(line, "plain")]
        rows.append([*_case(line), *times, beside[0], *ratios])
    return rows


def _path(line: Line) -> str:
    """Returns the path of ours that a case took, in a training step that of both directions."""
    chosen = line.get("chosen", "").partition(",")[0]
    return chosen.partition("/")[0] if line["case"]["mode"] == "infer" else chosen


def _fastest(line: Line) -> str:
    """Returns the fastest path if it is another one, with its share of the time of ours."""
    others = [name for name in line["seconds"] if name.startswith(VARIANT)]
    if not others:
        return ""
    best = min(others, key=lambda name: median(line, name))
    share = median(line, best) / median(line, "ours")
    return f"{best.removeprefix(VARIANT)} ({share:.2f})" if share < 1 / NOISE else ""


def _layers(run: Run, section: str) -> Rows:
    header = ["case", "mode", "plain", "eager", "ours", "path", "faster path", "ours/eager"]
    rows = [[*header, "ours/plain", "ours, predicted"]]
    for line in run.results(section):
        times = [_time(line, name) for name in ("plain", "eager", "ours")]
        ratios = [_ratio(line, other) for other in ("eager", "plain")]
        predicted = line["predicted"].get("ours")
        expected = time_of(predicted) if predicted else ""
        rows.append([*_case(line), *times, _path(line), _fastest(line), *ratios, expected])
    return rows


def _weights(run: Run) -> Rows:
    rows = [["weight", "mode", "a copy", "torch", "ours", "ours/torch", "ours/copy", "ours, GB/s"]]
    for line in run.results("weight_norm"):
        times = [_time(line, name) for name in ("plain", "eager", "ours")]
        ratios = [_ratio(line, other) for other in ("eager", "plain")]
        rate = line["case"]["bytes"] / median(line, "ours") / 1e9
        rows.append([*_case(line), *times, *ratios, f"{rate:.0f}"])
    return rows


def _models(run: Run) -> Rows:
    names = ["plain", "eager", "ours"]
    lines = run.results("models")
    others = dict.fromkeys(name for line in lines for name in line["seconds"] if name not in names)
    graph = [f"{name}, graph" for name in names]
    rows = [
        ["case", "mode", *names, *others, *graph, "ours/eager", "ours/plain", "the same, graph"]
    ]
    for line in lines:
        found = line["conditions"]["CUDA graph"]
        inside = {name: found[name]["median"] for name in names}
        times = [_time(line, name) for name in names]
        times += [_time(line, name) if name in line["seconds"] else "" for name in others]
        times += [time_of(inside[name]) for name in names]
        ratios = [_ratio(line, other) for other in ("eager", "plain")]
        ratios += ["{:.2f}, {:.2f}".format(*(inside["ours"] / inside[o] for o in names[1::-1]))]
        rows.append([*_case(line), *times, *ratios])
    return rows


def _predicted(run: Run) -> Rows:
    """Returns geometric means of what was measured over what the cost model expects."""
    rows = [["section", "mode", "plain", "eager", "ours"]]
    for section in TIMED:
        lines = run.results(section)
        for mode in dict.fromkeys(line["case"]["mode"] for line in lines):
            cells = []
            for name in ("plain", "eager", "ours"):
                quotients = [
                    median(line, name) / line["predicted"][name]
                    for line in lines
                    if line["case"]["mode"] == mode and line["predicted"].get(name)
                ]
                cells.append(f"{geometric_mean(quotients):.2f}" if quotients else "")
            if any(cells):
                rows.append([section, mode, *cells])
    return rows


def _sweeps(run: Run) -> Rows:
    rows = [["kernel", "ships", "fastest tried", "time", "of what ships"]]
    for line in of(run.lines, "sweep"):
        times = line["seconds"]
        if "shipped" not in times:
            continue
        best = min(times, key=lambda name: median(line, name))
        share = median(line, best) / median(line, "shipped")
        fields = ", ".join(line["case"].get("fields", ()))
        name = best if best == "shipped" or not fields else f"{best} ({fields})"
        ships = f"{line['case'].get('ships', '')} {_time(line, 'shipped')}".strip()
        rows.append([line["case"]["label"], ships, name, _time(line, best), f"{share:.2f}"])
    return rows


def text(run: Run) -> str:
    """Returns all tables of the page."""
    parts = [_where(run)]

    def add(title: str, table: Rows, *sentences: str) -> None:
        if len(table) > 1:
            parts.extend([f"### {title}", *sentences, markdown(table)])

    add("Geometric means, the worst first", _summary(run))
    losing = _losing(run)
    cases = "1 case is" if len(losing) == 2 else f"{len(losing) - 1} cases are"
    add(
        "Every case that loses to PyTorch's weight norm",
        losing,
        f"{cases} slower than eager by more than {NOISE - 1:.0%}.",
    )
    faults = _faults(run)
    if tests := _tests(run):
        parts += ["### Tests and faults", f"The kernels' tests: {tests}."]
    if faults:
        parts.append("\n".join(faults))
    add("The device", _facts(run))
    add(
        "Host: the processor's time of a call",
        _host(run),
        "`ours` uses the native library. Without it every call goes through Python.",
    )
    add(
        "Models: HiFi-GAN's vocoder",
        _models(run),
        "The first times are by the clock, call after call; the others are of a CUDA graph.",
    )
    add("weight_norm: the operator alone", _weights(run))
    faster = (
        "`path` is what the cost model chooses. `faster path` is one that was faster, with its "
        "share of the time of ours."
    )
    add("Linear layers", _layers(run, "linear"), faster)
    add("Convolutions", _layers(run, "conv"), faster)
    add("Configurations of single kernels", _sweeps(run))
    add(
        "Measured over predicted",
        _predicted(run),
        "Geometric means. Above 1 the cost model expects too little.",
    )
    return "\n\n".join(parts)


def short(run: Run) -> str:
    """Returns the README's table."""
    parts = [_where(run), markdown(_summary(run))]
    if faults := len(_faults(run)):
        parts.append(f"docs/gpu.md names {faults} faults and gaps of this run.")
    return "\n\n".join(parts)


def source(page: str) -> str:
    """Returns the path of the results that a page's tables name."""
    return page.partition("All figures are those of `")[2].partition("`")[0]


def write(path: str, page: str = "docs/gpu.md", readme: str = "README.md") -> int:
    """Replaces the tables between the marks of both files. Returns 1 if one has no marks, or the
    file of results holds none."""
    try:
        run = Run(path)
    except (OSError, IndexError) as error:
        print(f"{path} holds no results of bench gpu: {error}")
        return 1
    codes = [
        replaced(Path(page), MARKS, text(run)),
        replaced(Path(readme), README_MARKS, short(run)),
    ]
    return max(codes)
