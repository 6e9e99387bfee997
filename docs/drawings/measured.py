"""This drawing shows the measured ratios, from the results that the tables of the README have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bench.gpu import page
from docs.drawings.svg import Canvas

ROOT = Path(__file__).parent.parent.parent
# This folder has the results of the CPU that the README's table shows.
CPU_RESULTS = ROOT / "docs/results/emerald-rapids"
KINDS = {"linear": "linear layers", "conv": "convolutions"}
MODES = {"infer": "inference", "train": "training"}

# The axis begins at the pixel LEFT and shows ratios from 0 to TOP over WIDTH pixels.
LEFT, WIDTH, TOP = 250, 460, 1.3


def _of_processor() -> tuple[str, dict[tuple[str, str], float]]:
    """Returns the name of the CPU and the means of ours over eager, by suite and mode."""
    found = {}
    for suite in KINDS:
        report = json.loads((CPU_RESULTS / f"{suite}.json").read_text("utf-8"))
        for mode in MODES:
            found[suite, mode] = report["means"][f"{mode} ours/eager"]
    where = report["environment"]
    return f"{where['device'].split(',')[0]}, {where['threads']} threads, float32", found


def _of_gpus() -> Iterator[tuple[str, dict[tuple[str, str], float]]]:
    for run in page.committed(ROOT):
        means = page.means_of(run)
        found = {(s, m): means[s, m].eager for s in KINDS for m in MODES if (s, m) in means}
        yield f"{run.where['device']}, mostly bfloat16", found


def ratios() -> Canvas:
    """A bar for each kind of layer, mode and machine: our time over PyTorch's weight norm."""
    machines = [_of_processor(), *_of_gpus()]
    rows = sum(1 + len(found) for _, found in machines)
    height = 96 + 24 * rows + 10 * len(machines)
    c = Canvas(760, height, "Our time as a share of that of PyTorch's weight norm, by machine")
    c.text(24, 32, "Our time over that of PyTorch's weight norm", "head")
    c.text(24, 54, "Shorter is better; at 1 both take as long. Geometric means.", "small quiet")
    scale = WIDTH / TOP
    y = 76.0
    for name, found in machines:
        c.text(24, y + 13, name, "small")
        y += 24
        for (kind, mode), ratio in found.items():
            c.text(LEFT - 12, y + 13, f"{KINDS[kind]}, {MODES[mode]}", "small quiet", "end")
            c.box(LEFT, y, ratio * scale, 17, kind="ours", radius=2)
            c.text(LEFT + ratio * scale + 8, y + 13, f"{ratio:.2f}", "small")
            y += 24
        y += 10
    one = LEFT + scale
    c.line([(one, 66), (one, height - 14)], "dash")
    c.text(one + 6, height - 12, "PyTorch's weight norm", "small quiet")
    return c
