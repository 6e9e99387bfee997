"""Two runs on a GPU are compared case by case: ours before and after, with PyTorch's layers beside
it. The cases that lose the most to PyTorch's weight norm come first."""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from rich.console import Console

from bench.gpu.results import TIMED, Line, median, mode_of, of, read, words_of
from bench.report.tables import NOISE, printed, time_of

PROVIDERS = ("plain", "eager")

Key = tuple[str, str, str]


class Pair(NamedTuple):
    """The results of a case in both runs."""

    key: Key
    before: Line
    after: Line

    def ours(self) -> float:
        """Returns the time of ours after over that before."""
        return median(self.after, "ours") / median(self.before, "ours")

    def is_worse(self) -> bool:
        """Returns whether ours takes longer beyond noise, also in comparison with PyTorch's: a
        slower clock of the device would slow down both."""
        beside = self.over("eager") / _over(self.before, "eager")
        return min(self.ours(), beside) > NOISE

    def over(self, other: str) -> float:
        """Returns the time of ours over another provider's, after."""
        return _over(self.after, other)


def _over(line: Line, other: str) -> float:
    return median(line, "ours") / median(line, other)


def _cases(lines: list[Line], section: str) -> dict[Key, Line]:
    """Returns the first result of each case of a section in which everybody is right."""
    found: dict[Key, Line] = {}
    for line in of(lines, section):
        if {"ours", *PROVIDERS} <= line["seconds"].keys():
            about = " ".join(words_of(line["case"]))
            found.setdefault((section, about, line["case"]["mode"]), line)
    return found


def pairs(before: list[Line], after: list[Line], section: str) -> list[Pair]:
    """Returns the cases of a section that both runs have, the losing ones first."""
    old, new = _cases(before, section), _cases(after, section)
    found = [Pair(key, old[key], new[key]) for key in new if key in old]
    return sorted(found, key=lambda pair: pair.over("eager"), reverse=True)


def rows(found: list[Pair]) -> list[list[str]]:
    """Returns a table's rows, the header first. The times of PyTorch's layers are those of the
    second run."""
    header = ["case", "mode", "ours before", "ours after", "after/before", *PROVIDERS]
    lines = [[*header, *(f"ours/{other}" for other in PROVIDERS)]]
    for pair in found:
        times = [time_of(median(line, "ours")) for line in (pair.before, pair.after)]
        others = [time_of(median(pair.after, other)) for other in PROVIDERS]
        ratios = [f"{_over(pair.before, o):.2f} → {pair.over(o):.2f}" for o in PROVIDERS]
        _, label, mode = pair.key
        lines.append([label, mode, *times, f"{pair.ours():.2f}", *others, *ratios])
    return lines


def means(found: list[Pair]) -> list[str]:
    """Returns a sentence with the geometric means of each mode."""
    lines = []
    for mode in dict.fromkeys(mode_of(pair.after["case"]) for pair in found):
        some = [pair for pair in found if mode_of(pair.after["case"]) == mode]
        changed = geometric_mean(pair.ours() for pair in some)
        words = [f"{mode}, {len(some)} cases: ours after/before {changed:.2f}"]
        for other in PROVIDERS:
            then = geometric_mean(_over(pair.before, other) for pair in some)
            now = geometric_mean(pair.over(other) for pair in some)
            words.append(f"ours/{other} {then:.2f} → {now:.2f}")
        losing = sum(pair.over("eager") > NOISE for pair in some)
        words.append(f"{losing} slower than eager")
        lines.append(", ".join(words))
    return lines


def _where(lines: list[Line]) -> dict[str, Any]:
    for line in lines:
        if line["kind"] == "environment":
            return line["environment"]
    return {}


def main(before_path: str, after_path: str) -> int:
    """Prints what changed. Returns 1 if a case got slower or is gone."""
    console = Console(width=170)
    before, after = (read(Path(path)) for path in (before_path, after_path))
    for setting in ("device", "driver", "torch", "triton", "commit"):
        then, now = (_where(lines).get(setting) for lines in (before, after))
        if then != now:
            console.print(f"{setting}: {then}, now {now}")
    worse: list[str] = []
    gone: list[str] = []
    for section in TIMED:
        new = _cases(after, section)
        if not new:
            continue
        gone += [" ".join(key) for key in _cases(before, section) if key not in new]
        found = pairs(before, after, section)
        styles = ["red" if pair.is_worse() else "" for pair in found]
        worse += [" ".join(pair.key) for pair in found if pair.is_worse()]
        if found:
            console.print(printed(f"{section}: before and after", rows(found), styles))
            for text in means(found):
                console.print(f"{section}, {text}")
        fresh = [" ".join(key[1:]) for key in new if key not in {pair.key for pair in found}]
        if fresh:
            console.print(f"{section}, only after: {', '.join(fresh)}")
    for case in gone:
        console.print(f"[red]gone[/]: {case}")
    for case in worse:
        console.print(f"[red]slower[/]: {case}")
    console.print(f"{len(worse)} cases are slower than before, and {len(gone)} are gone")
    return 1 if worse or gone else 0
