"""The suites: checked in float64, timed interleaved, reported as ratios."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import time
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

import torch
from pytest_benchmark.stats import Stats
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.cases import SUITES, Case
from bench.timing import interleaved, is_wide, paired_ratio
from wn_kernels import plan
from wn_kernels import table as tuned

if TYPE_CHECKING:
    from bench.models import ModelCase


# A ratio of two equal layers from one run to the next.
NOISE = 1.05

# Uncertain cases are timed again while a suite has taken no longer than this share of its timing.
BUDGET = 1.1


def cases_of(suite: str) -> list[Any]:
    """The cases of a suite."""
    if suite == "norm":
        from bench import norms  # after `cases`, on which it builds

        return norms.CASES
    if suite == "models":
        from bench import models  # needs packages that the other suites do not

        return models.CASES
    return SUITES[suite]


def run_case(
    case: Case | ModelCase, device: torch.device, seconds: float, again: bool = True
) -> dict[str, Any]:
    """Checks and times one case, `again` where its ratios are uncertain.

    Raises:
        AssertionError: a provider is wrong.
    """
    runners = {name: case.runner(name, device) for name in case.providers}
    for runner in runners.values():
        runner.check()
    stats = interleaved(runners, device, seconds)
    ratios = _ratios(stats)
    if again and any(map(is_wide, ratios.values())):
        interleaved(runners, device, seconds, stats)
        ratios = _ratios(stats)
    return {
        "case": case.record(),
        "seconds": {
            name: {"median": s.median, "q1": s.q1, "q3": s.q3, "rounds": s.rounds}
            for name, s in stats.items()
        },
        "ratios": ratios,
        "noisy": any(map(is_wide, ratios.values())),
        "saved_bytes": {
            name: runner.saved_bytes() for name, runner in runners.items() if case.mode == "train"
        },
    }


def _ratios(stats: dict[str, Stats]) -> dict[str, dict[str, float]]:
    """Ours over each of the others."""
    others = (name for name in stats if name != "ours")
    return {f"ours/{name}": paired_ratio(stats["ours"], stats[name]) for name in others}


def environment(device: torch.device) -> dict[str, Any]:
    """Where and on what the run was made."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    cuda = device.type == "cuda"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name(device) if cuda else tuned.processor(),
        "backend": plan.choose_backend(torch.empty(0, device=device)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--short") else ""),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def geometric_means(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of ours/eager over all cases, and of ours/plain over those that count as large."""
    means = {}
    for mode in ("infer", "train"):
        cases = [r for r in results if r["case"]["mode"] == mode]
        large = [r for r in cases if r["case"]["is_large"]]
        for ratio, chosen in (("ours/eager", cases), ("ours/plain", large)):
            if chosen:
                values = [r["ratios"][ratio]["median"] for r in chosen]
                means[f"{mode} {ratio}"] = geometric_mean(values)
    return means


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """A table's rows, the header first."""
    providers = list(results[0]["seconds"])
    found = [["case", "mode", *providers, "ours/eager", "ours/plain", "saved, ours", "eager"]]
    for r in results:
        times = [_time(r["seconds"][name]["median"]) for name in providers]
        ratios = [_ratio(r["ratios"][f"ours/{name}"]) for name in ("eager", "plain")]
        saved = [_size(r["saved_bytes"].get(name)) for name in ("ours", "eager")]
        label = r["case"]["label"] + (" (noisy)" if r["noisy"] else "")
        found.append([label, r["case"]["mode"], *times, *ratios, *saved])
    return found


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _ratio(ratio: dict[str, float]) -> str:
    """The median and its 95 % interval."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / 1024:.0f} KiB"


def is_slower(result: dict[str, Any]) -> bool:
    """Whether ours is slower than eager beyond noise."""
    ratio = result["ratios"]["ours/eager"]
    return ratio["low"] > 1 and ratio["median"] > NOISE


def table(suite: str, results: list[dict[str, Any]], where: dict[str, Any]) -> Table:
    backend, device, threads = where["backend"], where["device"], where["threads"]
    shown = Table(
        title=f"{suite}, float32, backend [bold]{backend}[/] on {device}, {threads} threads"
    )
    header, *lines = rows(results)
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i < 2 else "right")
    for line, result in zip(lines, results, strict=True):
        shown.add_row(*line, style="yellow" if is_slower(result) else "")
    return shown


def main(suite: str, path: str, seconds: float) -> int:
    """Runs a suite; what is done is kept on Ctrl-C. 1 where a provider is wrong."""
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = environment(device)
    cases = sorted(cases_of(suite), key=lambda case: case.mode)
    results: list[dict[str, Any]] = []
    wrong: list[str] = []
    end = time.perf_counter() + BUDGET * seconds * len(cases)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(suite, total=len(cases))
        try:
            for case in cases:
                progress.update(task, description=f"{suite} {case.label} {case.mode}")
                try:
                    again = time.perf_counter() < end
                    results.append(run_case(case, device, seconds, again))
                except AssertionError as error:
                    wrong.append(str(error))
                progress.advance(task)
        except KeyboardInterrupt:
            console.print("interrupted: reporting what is done")
    means = geometric_means(results)
    if results:
        (console if console.is_terminal else Console(width=160)).print(table(suite, results, where))
    for name, value in means.items():
        large = suite == "linear" and "plain" in name
        over = "shapes of 1024 and up" if large else "all cases"
        console.print(f"geometric mean {name} over {over}: {value:.3f}")
    for message in wrong:
        console.print(f"[red]WRONG[/] {message}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    report = {
        "suite": suite,
        "environment": where,
        "settings": {"seconds": seconds, "dtype": "float32"},
        "results": results,
        "means": means,
    }
    Path(path).write_text(json.dumps(report | {"wrong": wrong}, indent=1) + "\n")
    console.print(f"results written to {path}")
    return 1 if wrong or not results else 0
