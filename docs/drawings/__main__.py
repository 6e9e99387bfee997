"""Writes the drawings into docs/figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from docs.drawings import imports, kernels, measured, overview
from docs.drawings.svg import Canvas

FIGURES = Path(__file__).parent.parent / "figures"

DRAWINGS: dict[str, Callable[[], Canvas]] = {
    "one-pass": overview.one_pass,
    "call": overview.call,
    "ratios": measured.ratios,
    "linear-forward": kernels.linear_forward,
    "linear-backward": kernels.linear_backward,
    "slices": kernels.slices,
    "implicit-product": kernels.implicit_product,
    "phases": kernels.phases,
    "unfolded": kernels.unfolded,
    "imports": imports.diagram,
}


def main() -> None:
    """Writes every file."""
    FIGURES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FIGURES / f"{name}.svg").write_text(draw().svg(), "utf-8")


if __name__ == "__main__":
    main()
