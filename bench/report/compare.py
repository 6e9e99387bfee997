"""What moved between two results of a suite, beyond noise.

Each side is one result, or several runs of the same code: a ratio's interval then reaches from the
lowest to the highest of the runs'. It moved where the two sides' intervals do not overlap and their
medians differ by more than `MARGIN`. One run knows nothing of what changes from process to process:
whether the allocator keeps a large block moves a layer of a few MiB by up to a half. Ratios are
compared, not times, which belong to a machine and a minute. Two runs of `bench gpu` are compared
by `bench.gpu.compare`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.gpu import compare as gpu
from bench.report.tables import printed

MARGIN = 0.05


def moved(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """`(case, ratio, before, after)` of what moved. Ratios of ours: more is worse."""
    old = {_key(r): r for r in before["results"]}
    found = []
    for result in after["results"]:
        for name, now in result["ratios"].items():
            then = old.get(_key(result), {}).get("ratios", {}).get(name)
            if then is None:
                continue
            apart = now["low"] > then["high"] or now["high"] < then["low"]
            if apart and abs(now["median"] / then["median"] - 1) > MARGIN:
                found.append((" ".join(_key(result)), name, then["median"], now["median"]))
    return found


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of a suite as one result: medians of medians, and intervals that hold all."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for result in run["results"]:
            found.setdefault(_key(result), []).append(result)
    results = []
    for same in found.values():
        ratios = {}
        for name in same[0]["ratios"]:
            each = [r["ratios"][name] for r in same]
            ratios[name] = {
                "median": statistics.median(x["median"] for x in each),
                "low": min(x["low"] for x in each),
                "high": max(x["high"] for x in each),
            }
        results.append(same[0] | {"ratios": ratios})
    return runs[0] | {"results": results}


def _key(result: dict[str, Any]) -> tuple[str, str]:
    return result["case"]["label"], result["case"]["mode"]


def main(before_path: str, after_path: str) -> int:
    """Prints what moved; 1 where something got worse, or a case is gone."""
    if before_path.endswith(".jsonl") and after_path.endswith(".jsonl"):
        return gpu.main(before_path, after_path)
    console = Console()
    before, after = (
        together([json.loads(Path(p).read_text("utf-8")) for p in paths.split(",")])
        for paths in (before_path, after_path)
    )
    if before["suite"] != after["suite"]:
        console.print(f"not one suite: {before['suite']!r} and {after['suite']!r}")
        return 2
    for setting in ("device", "threads", "torch"):
        then, now = (results["environment"][setting] for results in (before, after))
        if then != now:
            console.print(f"[yellow]{setting} differs[/]: {then}, now {now}")
    rows = moved(before, after)
    lines = [["case", "ratio", "before", "after"]]
    lines += [[case, ratio, f"{then:.2f}", f"{now:.2f}"] for case, ratio, then, now in rows]
    if rows:
        styles = ["red" if now > then else "green" for *_, then, now in rows]
        console.print(printed(f"{after['suite']}: what moved beyond noise", lines, styles))
    gone = {_key(r) for r in before["results"]} - {_key(r) for r in after["results"]}
    for case in sorted(gone):
        console.print(f"[red]gone[/]: {' '.join(case)}")
    worse = sum(now > then for _, _, then, now in rows)
    console.print(f"{len(rows)} ratios moved, {worse} of them to the worse, {len(gone)} cases gone")
    return 1 if worse or gone else 0
