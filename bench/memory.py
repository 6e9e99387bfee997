"""What a training step of each layer holds: beyond its input and its parameters between forward and
backward, and at most at any moment."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from bench import suite
from bench.cases import SUITES, Case
from bench.measure import precision
from bench.measure.allocation import peak_bytes
from bench.report.tables import competing, printed


def _measured(case: Case, device: torch.device, full: bool) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {"saved_bytes": {}, "peak_bytes": {}}
    for name, build in case.competitors(device, full).items():
        run = build()
        with run.session():
            run.check()
            found["saved_bytes"][name] = run.saved_bytes()
            found["peak_bytes"][name] = peak_bytes(run, device)
    return found


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """A table's rows, the header first: KiB saved, and KiB at most."""
    names = competing(results[0]["saved_bytes"])
    header = [f"{what}, {name}" for what in ("saved", "peak") for name in names]
    lines = [["case", *header]]
    for result in results:
        found = [result[what][name] for what in ("saved_bytes", "peak_bytes") for name in names]
        lines.append([result["case"]["label"], *(f"{size / 1024:.0f}" for size in found)])
    return lines


def main(path: str, full: bool) -> int:
    """Checks every layer's providers and measures them; 1 where one is wrong."""
    console = Console()
    precision.set_tf32(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = suite.environment(device)
    cases = [c for layers in SUITES.values() for c in layers if c.mode == "train"]
    results, wrong = [], []
    try:
        for case in track(cases, "memory", console=console, transient=True):
            try:
                results.append({"case": case.record(), **_measured(case, device, full)})
            except AssertionError as error:
                wrong.append(str(error))
    except KeyboardInterrupt:
        console.print("interrupted: reporting what is done")
    if results:
        shown = printed(
            "KiB of a training step, beyond the input and the parameters", rows(results)
        )
        (console if console.is_terminal else Console(width=160)).print(shown)
    settings = {"dtype": "float32", "full": full}
    return suite.finish("memory", path, where, settings, results, wrong, console)
