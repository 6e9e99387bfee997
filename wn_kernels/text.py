"""This file formats tables, in plain text and in HTML, and shows how far a loop has come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import TypeVar

Item = TypeVar("Item")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table. Its first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def html(rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Returns a table in HTML, which a notebook shows. Its first row is the header. A caption
    stands below it."""
    header, *body = rows
    cells = [[f"<td>{escape(cell)}</td>" for cell in row] for row in body]
    lines = [f"<tr>{''.join(row)}</tr>" for row in cells]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    below = (
        [f'<caption style="caption-side: bottom">{escape(caption)}</caption>'] if caption else []
    )
    return "\n".join(["<table>", *below, f"<thead><tr>{head}</tr></thead>", *lines, "</table>"])


class Tabular:
    """Prints as a table, and a notebook shows it as one. A class of reports gives its rows, the
    header among them, and a line that stands below."""

    def _rows(self) -> list[tuple[str, ...]]:
        raise NotImplementedError

    def _summary(self) -> str:
        return ""

    def __str__(self) -> str:
        summary = self._summary()
        return "\n".join([*aligned(self._rows()), *([summary] if summary else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(self._rows(), self._summary())


def _line() -> Callable[[str], None] | None:
    """Returns a function that replaces a line of text: an output of a notebook's cell, or the last
    line of a terminal on standard error. Returns `None` where nobody watches."""
    stream = sys.stderr
    if type(stream).__module__.startswith("ipykernel"):
        # A notebook keeps what is written to standard error. An output of its own can be emptied.
        from IPython.display import DisplayHandle

        handle = DisplayHandle()
        handle.display({"text/plain": ""}, raw=True)
        return lambda line: handle.update({"text/plain": line}, raw=True)
    if not stream.isatty():
        return None
    width = 0

    def show(line: str) -> None:
        nonlocal width
        blank = "\r" + " " * width if len(line) < width else ""
        width = len(line)
        print(f"{blank}\r{line}", end="", file=stream, flush=True)

    return show


def progress(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yields the items. Meanwhile a line counts them, in a terminal or a notebook. It is blank at
    the end."""
    show = _line() if items else None
    try:
        for i, item in enumerate(items, 1):
            if show:
                show(f"{what} {i} of {len(items)}")
            yield item
    finally:
        if show:
            show("")
