"""Figures that must not get worse: committed, and compared by continuous integration.

A baseline names the compiler that its figures were read from the code of, where there is one. They
say nothing about the code of another compiler, which moves them by several percent either way.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

FOLDER = Path(__file__).parent / "baselines"

# What an exact figure may grow by: a small change elsewhere may move it a little.
TOLERANCE = 1.02

Figures = dict[str, dict[str, float]]


def write(name: str, found: Figures, compiler: str | None = None) -> Path:
    """Replaces a baseline, a line for each record."""
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    lines = (f" {json.dumps(key, ensure_ascii=False)}: {json.dumps(found[key])}" for key in found)
    head = f'{{\n "compiler": {json.dumps(compiler)},\n "figures": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n}}\n", "utf-8")
    return path


def read(name: str) -> tuple[Figures, str | None]:
    """A baseline's figures, and the compiler that they belong to; `None` for any."""
    committed = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return committed["figures"], committed["compiler"]


def worse(
    name: str, found: Figures, complete: bool = True, tolerance: float = TOLERANCE
) -> list[str]:
    """What grew beyond the baseline, or is missing from it or, where the run was `complete`, from
    what was found; a message each."""
    committed, _ = read(name)
    messages = [f"{key} is not in the baseline" for key in found.keys() - committed.keys()]
    if complete:
        messages += [f"{key} is gone" for key in committed.keys() - found.keys()]
    for key in found.keys() & committed.keys():
        for figure, before in committed[key].items():
            now = found[key].get(figure)
            if now is None or now > tolerance * before:
                messages.append(f"{key}: {figure} is {now}, was {before}")
    return sorted(messages)


def settle(
    console: Console,
    name: str,
    found: Figures,
    replace: bool,
    complete: bool = True,
    compiler: str | None = None,
    tolerance: float = TOLERANCE,
) -> int:
    """Replaces a baseline, or prints what is worse than it, and how much that is; returns that.
    Nothing is compared with the figures of another compiler."""
    if replace:
        console.print(f"baseline written to {write(name, found, compiler)}")
        return 0
    _, theirs = read(name)
    if compiler != theirs:
        console.print(f"the baseline is {theirs}'s: under {compiler}, nothing is compared with it")
        return 0
    messages = worse(name, found, complete, tolerance)
    for message in messages:
        console.print(f"[red]WORSE[/] {message}")
    console.print(f"{len(messages)} of {len(found)} worse than the baseline")
    return len(messages)
