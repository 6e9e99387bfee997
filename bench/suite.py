"""The suites: checked in float64, timed interleaved, reported as ratios."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

import torch
from pytest_benchmark.stats import Stats
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import norms, overhead
from bench.cases import SUITES, Case
from bench.measure import precision
from bench.measure.allocation import peak_bytes
from bench.measure.timing import (
    Replay,
    ceilings,
    interleaved,
    is_wide,
    paired_ratio,
    replayed,
    rotated,
    sampler,
    session_of,
)
from bench.report.tables import tables
from wn_kernels import plan
from wn_kernels.backends import native
from wn_kernels.plan import table as tuned

if TYPE_CHECKING:
    from bench.models import ModelCase


# Uncertain cases are timed again while a suite has taken no longer than this share of its timing.
BUDGET = 1.1


def cases_of(suite: str) -> list[Any]:
    """The cases of a suite."""
    if suite == "models":
        from bench import models  # needs packages that the other suites do not

        return models.CASES
    if suite == "recurrent":
        from bench import recurrent

        return recurrent.CASES
    if suite == "second-order":
        from bench import second_order

        return second_order.CASES
    return (SUITES | {"norm": norms.CASES, "overhead": overhead.CASES})[suite]


def run_case(
    case: Case | ModelCase | norms.NormCase,
    device: torch.device,
    seconds: float,
    again: bool = True,
    full: bool = False,
) -> dict[str, Any]:
    """Checks and times one case, `again` where its ratios are uncertain, `full` with every provider
    and on a GPU under every condition.

    Raises:
        AssertionError: a provider is wrong.
    """
    runners = {name: build() for name, build in case.competitors(device, full).items()}
    for runner in runners.values():
        with session_of(runner)():
            runner.check()
    sample = sampler(device)
    stats = interleaved(runners, device, seconds, sample=sample)
    ratios = ratios_of(stats)
    if again and any(map(is_wide, ratios.values())):
        interleaved(runners, device, seconds, stats, sample)
        ratios = ratios_of(stats)
    result = {
        "case": case.record(),
        "seconds": medians(stats),
        "ratios": ratios,
        "noisy": any(map(is_wide, ratios.values())),
        "saved_bytes": {
            name: runner.saved_bytes() for name, runner in runners.items() if case.mode == "train"
        },
    }
    if device.type == "cuda":
        result["peak_bytes"] = {name: peak_bytes(run, device) for name, run in runners.items()}
        if full:
            result["conditions"] = {
                "CUDA graph": _graphs(runners, replayed, device, seconds / 2),
                "CUDA graph, cold L2": _graphs(runners, rotated, device, seconds / 2),
            }
    return result


def medians(stats: dict[str, Stats]) -> dict[str, dict[str, float]]:
    """As a result has them."""
    return {
        name: {"median": s.median, "q1": s.q1, "q3": s.q3, "rounds": s.rounds}
        for name, s in stats.items()
    }


def _graphs(
    runners: dict[str, Any],
    capture: Callable[[Any, torch.device], Replay],
    device: torch.device,
    seconds: float,
) -> dict[str, dict[str, float]]:
    """Of the runners that a graph can hold."""
    graphs: dict[str, Callable[[], None]] = {}
    for name, run in runners.items():
        try:
            graphs[name] = capture(run, device)
        except RuntimeError:  # it reads a value on the CPU
            torch.cuda.synchronize(device)
    return medians(interleaved(graphs, device, seconds)) if graphs else {}


def ratios_of(stats: dict[str, Stats]) -> dict[str, dict[str, float]]:
    """Ours over each of the others."""
    others = (name for name in stats if name != "ours")
    return {f"ours/{name}": paired_ratio(stats["ours"], stats[name]) for name in others}


# This variable names the commit where there is no git or no repository.
COMMIT = "WN_KERNELS_COMMIT"


def commit() -> str:
    """The commit that is checked out, with a `+` where files have changed since. Without git, or
    outside of a repository, the environment variable `WN_KERNELS_COMMIT` names it; otherwise it is
    `"unknown"`."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--short") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT, "unknown")


def driver() -> str | None:
    """The version of the GPU's driver; `None` where its tool does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def environment(device: torch.device) -> dict[str, Any]:
    """Where and on what the run was made."""

    cuda = device.type == "cuda"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name(device) if cuda else tuned.processor(),
        **({"driver": driver()} if cuda else {}),
        "backend": plan.serving(torch.empty(0, device=device)),
        "native": native.unavailable() is None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "float32": precision.settings(),
        "commit": commit(),
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


def finish(
    suite: str,
    path: str,
    where: dict[str, Any],
    settings: dict[str, Any],
    results: list[dict[str, Any]],
    wrong: list[str],
    console: Console,
    **more: Any,
) -> int:
    """Writes the results, and says what was wrong: 1 if anything, or if there is no result."""
    for message in wrong:
        console.print(f"[red]WRONG[/] {message}")
    report = {
        "suite": suite,
        "environment": where,
        "settings": settings,
        "results": results,
        "wrong": wrong,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report | more, indent=1) + "\n")
    console.print(f"results written to {path}")
    return 1 if wrong or not results else 0


def main(suite: str, path: str, seconds: float, full: bool = False, dtype: str = "float32") -> int:
    """Runs a suite; what is done is kept on Ctrl-C. 1 where a provider is wrong."""
    console = Console()
    precision.set_tf32(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where, limits = environment(device), ceilings(device, getattr(torch, dtype))
    cases = sorted(cases_of(suite), key=lambda case: case.mode)
    if suite in SUITES:
        if dtype != "float32":
            cases = [replace(case, dtype=dtype) for case in cases]
        dtype = ", ".join(sorted({case.dtype for case in cases}))
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
                    results.append(run_case(case, device, seconds, again, full))
                    if suite == "overhead":
                        overhead.add_profile(case, results[-1], device)
                except AssertionError as error:
                    wrong.append(str(error))
                progress.advance(task)
        except KeyboardInterrupt:
            console.print("interrupted: reporting what is done")
    means = geometric_means(results)
    if results:
        for shown in tables(suite, results, where, dtype):
            (console if console.is_terminal else Console(width=160)).print(shown)
    for name, value in means.items():
        large = suite == "linear" and "plain" in name
        over = "shapes of 1024 and up" if large else "all cases"
        console.print(f"geometric mean {name} over {over}: {value:.3f}")
    settings = {"seconds": seconds, "dtype": dtype, "full": full}
    more = {"means": means, "ceilings": limits}
    return finish(suite, path, where, settings, results, wrong, console, **more)
