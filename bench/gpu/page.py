"""The pages about GPUs are made from the JSON lines of the committed runs.

`docs/results/gpu-<name>/results.jsonl` holds the lines of a device. It becomes the page
`docs/gpu-<name>.md`, on which the losing cases come first. The README and docs/gpu.md show the
geometric means of all devices.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from bench.gpu.results import (
    COPY,
    READ,
    TIMED,
    Line,
    is_other_norm,
    median,
    mode_of,
    of,
    read,
    words_of,
)
from bench.providers import NORM_L2, VARIANT
from bench.report.page import markdown, replaced
from bench.report.tables import NOISE, time_of

# The table of all devices lies between these marks.
MARKS = (
    "<!-- gpu: written by python -m bench gpu --publish -->",
    "<!-- gpu: end -->",
)
OVERVIEWS = ("README.md", "docs/gpu.md")

# A fused model is compared with these.
BASELINES = ("plain", "eager")

# Characters of a message.
LONGEST = 300

Rows = list[list[str]]


class Run:
    """The lines of a run, and what several tables need of them.

    Attributes:
        path: the file.
        lines: all lines.
        where: the environment of the first section.
        commits: the sections that ran at each commit.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, read(path)
        environments = [line for line in self.lines if line["kind"] == "environment"]
        if not environments:
            raise ValueError(f"{path} holds no results of bench gpu")
        self.where: dict[str, Any] = environments[0]["environment"]
        # A file may hold the sections of several runs.
        self.commits: dict[str, list[str]] = {}
        for line in environments:
            commit = line["environment"]["commit"]
            self.commits.setdefault(commit, []).append(line["section"])

    @property
    def page(self) -> str:
        """Returns the name of the page that shows this run."""
        return f"{self.path.parent.name}.md"

    def results(self, section: str) -> list[Line]:
        """Returns the cases of a section in which ours, plain and eager are right. Those that lose
        the most to eager come first."""
        providers = {"ours", "plain", "eager"}
        found = [x for x in of(self.lines, section) if providers <= x["seconds"].keys()]
        return sorted(found, key=lambda line: over(line, "eager"), reverse=True)

    def of_l2(self, section: str) -> list[Line]:
        """Returns the same without the cases of other norms."""
        return [line for line in self.results(section) if not is_other_norm(line["case"])]

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
    first, *others = run.commits
    later = [f"{commit} for {' and '.join(run.commits[commit])}" for commit in others]
    commits = ", ".join([first, *later])
    return (
        f"One {where['device']}: driver {driver}, torch {where['torch']}{cudnn}, triton "
        f"{where['triton']}, Python {where['python']}, commit {commits}, on "
        f"{where['time'][:10]}. All figures are those of `{run.path.as_posix()}`."
    )


class Mean(NamedTuple):
    """Holds what a section shows in one mode: geometric means of ratios, and the extreme cases.

    Attributes:
        eager: ours over PyTorch's weight norm.
        plain: ours over the layer without weight norm.
        cases: the number of cases.
        slower: the number of those that are slower than eager by more than noise.
        worst: the case with the largest ratio to eager.
        best: the case with the smallest.
    """

    eager: float
    plain: float
    cases: int
    slower: int
    worst: str
    best: str


def means_of(run: Run) -> dict[tuple[str, str], Mean]:
    """Returns the means of each section and mode, the worst first."""
    found = {}
    for section in TIMED:
        lines = run.results(section)
        for mode in dict.fromkeys(mode_of(line["case"]) for line in lines):
            some = [line for line in lines if mode_of(line["case"]) == mode]
            eager, plain = (
                geometric_mean(over(line, other) for line in some) for other in ("eager", "plain")
            )
            worst, best = (f"{_ratio(x, 'eager')} ({_case(x)[0]})" for x in (some[0], some[-1]))
            slower = sum(over(line, "eager") > NOISE for line in some)
            found[section, mode] = Mean(eager, plain, len(some), slower, worst, best)
    return dict(sorted(found.items(), key=lambda item: item[1].eager, reverse=True))


def _summary(run: Run) -> Rows:
    header = ["section", "mode", "cases", "ours/eager", "slower than eager"]
    rows = [[*header, "worst case", "best case", "ours/plain"]]
    for key, mean in means_of(run).items():
        cells = [str(mean.cases), f"{mean.eager:.2f}", str(mean.slower), mean.worst, mean.best]
        rows.append([*key, *cells, f"{mean.plain:.2f}"])
    return rows


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
    for line in run.of_l2(section):
        times = [_time(line, name) for name in ("plain", "eager", "ours")]
        ratios = [_ratio(line, other) for other in ("eager", "plain")]
        predicted = line["predicted"].get("ours")
        expected = time_of(predicted) if predicted else ""
        rows.append([*_case(line), *times, _path(line), _fastest(line), *ratios, expected])
    return rows


def _weights(run: Run) -> Rows:
    rows = [["weight", "mode", "a copy", "torch", "ours", "ours/torch", "ours/copy", "ours, GB/s"]]
    for line in run.of_l2("weight_norm"):
        times = [_time(line, name) for name in ("plain", "eager", "ours")]
        ratios = [_ratio(line, other) for other in ("eager", "plain")]
        rate = line["case"]["bytes"] / median(line, "ours") / 1e9
        rows.append([*_case(line), *times, *ratios, f"{rate:.0f}"])
    return rows


def _norms(run: Run) -> Rows:
    """Returns the cases of other norms beside the same of l2."""
    rows = [["section", "case", "mode", "plain", "eager", "ours", "ours, l2", "ours/eager"]]
    rows[0] += ["ours/ours, l2", "ours/plain"]
    for section in TIMED:
        for line in run.results(section):
            if is_other_norm(line["case"]) and NORM_L2 in line["seconds"]:
                times = [_time(line, name) for name in ("plain", "eager", "ours", NORM_L2)]
                ratios = [_ratio(line, other) for other in ("eager", NORM_L2, "plain")]
                rows.append([section, *_case(line), *times, *ratios])
    return rows


def _steps(run: Run) -> Rows:
    """Returns whole steps by the clock, and the processor's part of them."""
    names = ("plain", "eager", "ours", "frozen")
    header = ["case", "mode", *names, "ours/eager", "ours/plain"]
    rows = [[*header, "eager, processor", "ours, processor", "ours/eager, processor"]]
    for line in run.results("steps"):
        times = [_time(line, name) for name in names]
        ratios = [_ratio(line, other) for other in ("eager", "plain")]
        eager, ours = (line["conditions"]["processor"][n]["median"] for n in ("eager", "ours"))
        processor = [time_of(eager), time_of(ours), f"{ours / eager:.2f}"]
        rows.append([*_case(line), *times, *ratios, *processor])
    return rows


def _models(run: Run) -> Rows:
    lines = run.results("models")
    names = list(dict.fromkeys(name for line in lines for name in line["seconds"]))
    fused = [name for name in names if name not in BASELINES]
    pairs = [(name, other) for other in ("eager", "plain") for name in fused]
    ratios = ["/".join(pair) for pair in pairs]
    header = ["case", "mode", *names, *(f"{name}, graph" for name in names), *ratios]
    rows = [[*header, *(f"{ratio}, graph" for ratio in ratios)]]
    for line in lines:
        times, quotients = [], []
        for stats in (line["seconds"], line["conditions"]["CUDA graph"]):
            found = {name: stat["median"] for name, stat in stats.items()}
            times += [time_of(found[name]) if name in found else "" for name in names]
            quotients += [
                f"{found[one] / found[other]:.2f}" if {one, other} <= found.keys() else ""
                for one, other in pairs
            ]
        rows.append([*_case(line), *times, *quotients])
    return rows


def _predicted(run: Run) -> Rows:
    """Returns geometric means of what was measured over what the cost model expects."""
    rows = [["section", "mode", "plain", "eager", "ours"]]
    for section in TIMED:
        lines = run.results(section)
        for mode in dict.fromkeys(mode_of(line["case"]) for line in lines):
            cells = []
            for name in ("plain", "eager", "ours"):
                quotients = [
                    median(line, name) / line["predicted"][name]
                    for line in lines
                    if mode_of(line["case"]) == mode and line["predicted"].get(name)
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
    """Returns the page of a run."""
    parts = [
        f"# {run.where['device']}",
        "This page shows every case of the last runs of `python -m bench gpu`. [On a GPU](gpu.md) "
        "says what the sections are and what is timed.",
        _where(run),
    ]

    def add(title: str, table: Rows, *sentences: str) -> None:
        if len(table) > 1:
            parts.extend([f"## {title}", *sentences, markdown(table)])

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
        parts += ["## Tests and faults", f"The kernels' tests: {tests}."]
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
    add(
        "Other norms beside l2",
        _norms(run),
        "PyTorch has no kernel for the norms l1 and linf: `eager` is made of its operations.",
    )
    add(
        "Steps: recurrent layers, second derivatives and a DINO head",
        _steps(run),
        "The times are by the clock, call after call, with the processor's part of a call.",
    )
    faster = (
        "`path` is what the cost model chooses. `faster path` is one that was faster, with its "
        "share of the time of ours."
    )
    add("Linear layers", _layers(run, "linear"), faster)
    add("Convolutions", _layers(run, "conv"), faster)
    add("Random layers", _layers(run, "random"), faster)
    add("Configurations of single kernels", _sweeps(run))
    add(
        "Measured over predicted",
        _predicted(run),
        "Geometric means. Above 1 the cost model expects too little.",
    )
    return "\n\n".join(parts) + "\n"


def overview(runs: Sequence[Run]) -> str:
    """Returns the table of all devices: geometric means, and how many cases lose to eager. The
    section that is the worst on any device comes first."""
    means = {run.where["device"]: means_of(run) for run in runs}
    header = ["section", "mode"]
    for device in means:
        header += [f"{device}: ours/eager", "ours/plain", "slower than eager"]
    worst: dict[tuple[str, str], float] = {}
    for found in means.values():
        for key, mean in found.items():
            worst[key] = max(mean.eager, worst.get(key, 0.0))
    rows = [header]
    for key in sorted(worst, key=worst.__getitem__, reverse=True):
        cells = list(key)
        for found in means.values():
            if mean := found.get(key):
                slower = f"{mean.slower} of {mean.cases}"
                cells += [f"{mean.eager:.2f}", f"{mean.plain:.2f}", slower]
            else:
                cells += [""] * 3
        rows.append(cells)
    faults = [
        f"`docs/{run.page}` names {count} faults and gaps of its run."
        for run in runs
        if (count := len(_faults(run)))
    ]
    return "\n\n".join([*map(_where, runs), markdown(rows), *faults])


def committed(root: Path = Path()) -> list[Run]:
    """Returns the committed runs, one for each device.

    Raises:
        ValueError: if a file holds no results, or there is none.
    """
    runs = [Run(path) for path in sorted(root.glob("docs/results/gpu-*/results.jsonl"))]
    if not runs:
        raise ValueError("docs/results holds no results of bench gpu")
    return runs


def write() -> int:
    """Writes the pages, and the overviews between their marks. Returns 1 if a file of results is
    empty, or a page has no marks."""
    try:
        runs = committed()
    except ValueError as error:
        print(error)
        return 1
    for run in runs:
        Path("docs", run.page).write_text(text(run), "utf-8")
    table = overview(runs)
    return max(replaced(Path(path), MARKS, table) for path in OVERVIEWS)
