"""The report's plots, each as SVG: ratios by case, time over the plain layer's by rows and by size,
and the roofline."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.layer import MODES
from bench.report.tables import competing

matplotlib.use("svg")

# The titles call the modes of a case by these words.
TIMES = {"infer": "inference", "train": "training"}

COLORS = {
    "plain": "tab:gray",
    "eager": "tab:orange",
    "legacy": "tab:brown",
    "compiled": "tab:purple",
    "FlagGems": "tab:green",
    "ours": "tab:blue",
}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)


def _panels(
    results: list[dict[str, Any]],
) -> tuple[Figure, list[tuple[Axes, str, list[dict[str, Any]]]]]:
    """A figure with a panel for each mode, and its cases."""
    modes = [(mode, [r for r in results if r["case"]["mode"] == mode]) for mode in MODES]
    modes = [(mode, cases) for mode, cases in modes if cases]
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(modes), squeeze=False)[0]
    return figure, [(axes, *mode) for axes, mode in zip(panels, modes, strict=True)]


def ratios(results: list[dict[str, Any]], mode: str) -> str:
    """Ours over eager and over the plain layer, with the 95 % interval of each."""
    cases = [r for r in results if r["case"]["mode"] == mode]
    if not cases:
        return ""
    figure = Figure(figsize=(9, 0.35 * len(cases) + 1.2))
    axes = figure.subplots()
    for offset, other in ((-0.15, "eager"), (0.15, "plain")):
        found = [r["ratios"][f"ours/{other}"] for r in cases]
        medians = [x["median"] for x in found]
        spread = [
            [x["median"] - x["low"] for x in found],
            [x["high"] - x["median"] for x in found],
        ]
        heights = [i + offset for i in range(len(cases))]
        options = {"fmt": "o", "ms": 4, "color": COLORS[other], "label": f"ours/{other}"}
        axes.errorbar(medians, heights, xerr=spread, **options)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    ticks = [0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(cases)), [r["case"]["label"] for r in cases])
    axes.invert_yaxis()
    axes.set_xlabel("our time over that of PyTorch's weight norm (eager) and of the plain layer")
    axes.set_title(f"{TIMES[mode]}: left of 1 ours is faster, and further left is better")
    axes.legend()
    return _svg(figure)


def _over_plain(axes: Axes, label: str, title: str) -> None:
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [1, 1.5, 2, 3, 5, 8]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("time over that of the plain layer")
    axes.set_title(f"{TIMES[title]}: lower is better")
    if axes.get_legend_handles_labels()[0]:  # one size of layer alone has no line over the rows
        axes.legend()


def _slowdown(result: dict[str, Any], name: str) -> float:
    seconds = result["seconds"]
    return seconds[name]["median"] / seconds["plain"]["median"]


def by_rows(results: list[dict[str, Any]]) -> str:
    """Of linear layers, by the rows of the batch: a line for each size of layer."""
    figure, panels = _panels(results)
    for axes, mode, cases in panels:
        sizes = defaultdict(list)
        for r in cases:
            sizes[tuple(r["case"]["arguments"])].append(r)
        for (k, n), same in sizes.items():
            if len(same) < 2:
                continue
            same.sort(key=lambda r: r["case"]["x_shape"][0])
            for name, style in (("eager", "o--"), ("ours", "o-")):
                axes.plot(
                    [r["case"]["x_shape"][0] for r in same],
                    [_slowdown(r, name) for r in same],
                    style,
                    ms=4,
                    color=COLORS[name],
                    alpha=0.4 + 0.6 * (k == max(k for k, _ in sizes)),
                    label=f"{name}, {k}→{n}",
                )
        _over_plain(axes, "rows of the batch", mode)
    return _svg(figure)


def by_size(results: list[dict[str, Any]]) -> str:
    """By the parameters of the layer or of the model."""
    figure, panels = _panels(results)
    for axes, mode, cases in panels:
        for name in ("eager", "ours"):
            axes.plot(
                [r["case"]["parameters"] for r in cases],
                [_slowdown(r, name) for r in cases],
                "o",
                ms=4,
                color=COLORS[name],
                label=name,
            )
        _over_plain(axes, "parameters", mode)
    return _svg(figure)


def roofline(results: list[dict[str, Any]], ceilings: dict[str, float]) -> str:
    """Operations per second by operations per byte that has to move, under what this device was
    measured to copy and to multiply. Above the slope: the weight was in cache already."""
    figure, panels = _panels(results)
    for axes, mode, cases in panels:
        intensity = [r["case"]["operations"] / r["case"]["bytes"] for r in cases]
        for name in competing(cases[0]["seconds"]):
            rates = [r["case"]["operations"] / r["seconds"][name]["median"] for r in cases]
            axes.plot(intensity, rates, "o", ms=4, color=COLORS[name], label=name)
        ridge = ceilings["rate"] / ceilings["bandwidth"]
        edges = sorted((min(intensity) / 1.5, ridge, max(intensity) * 1.5))
        roof = [min(ceilings["rate"], x * ceilings["bandwidth"]) for x in edges]
        axes.plot(edges, roof, color="black", lw=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations per byte that has to move")
        axes.set_ylabel("operations per second")
        axes.set_title(f"{TIMES[mode]}: higher is better, up to the black roof")
        axes.legend()
    return _svg(figure)
