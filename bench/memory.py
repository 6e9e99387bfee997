"""What a training step of each layer holds: beyond its input and its parameters between forward and
backward, and at most at any moment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most that a run has allocated at once, over what there was before it."""
    with getattr(run, "session", nullcontext)():
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """A table's rows, the header first: KiB saved, and KiB at most."""
    names = [name for name in results[0]["saved_bytes"] if not name.startswith("ours:")]
    header = [f"{what}, {name}" for what in ("saved", "peak") for name in names]
    lines = [["case", *header]]
    for result in results:
        found = [result[what][name] for what in ("saved_bytes", "peak_bytes") for name in names]
        lines.append([result["case"]["label"], *(f"{size / 1024:.0f}" for size in found)])
    return lines


def main(path: str, full: bool) -> int:
    """Checks every layer's providers and measures them; 1 where one is wrong."""
    from bench import suite

    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [c for layers in suite.SUITES.values() for c in layers if c.mode == "train"]
    results, wrong = [], []
    for case in track(cases, "memory", console=console, transient=True):
        found: dict[str, dict[str, int]] = {"saved_bytes": {}, "peak_bytes": {}}
        try:
            for name, build in case.competitors(device, full).items():
                run = build()
                with run.session():
                    run.check()
                    found["saved_bytes"][name] = run.saved_bytes()
                found["peak_bytes"][name] = peak_bytes(run, device)
            results.append({"case": case.record(), **found})
        except AssertionError as error:
            wrong.append(str(error))
    if results:
        shown = Table(title="KiB of a training step, beyond the input and the parameters")
        header, *lines = rows(results)
        for i, name in enumerate(header):
            shown.add_column(name, justify="right" if i else "left")
        for line in lines:
            shown.add_row(*line)
        (console if console.is_terminal else Console(width=160)).print(shown)
    return suite.finish("memory", path, device, {"full": full}, results, wrong, console)
