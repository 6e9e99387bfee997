"""This file formats tables, in plain text and in HTML, and shows how far a loop has come."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
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


def progress(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yields the items. Meanwhile a line on standard error counts them, in a terminal or a
    notebook. It is blank at the end."""
    stream = sys.stderr
    is_watched = stream.isatty() or type(stream).__module__.startswith("ipykernel")
    line = ""
    try:
        for i, item in enumerate(items, 1):
            if is_watched:
                line = f"{what} {i} of {len(items)}"
                print(f"\r{line}", end="", file=stream, flush=True)
            yield item
    finally:
        if line:
            print("\r" + " " * len(line), end="\r", file=stream, flush=True)
