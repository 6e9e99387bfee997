"""This file formats tables, in plain text and in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table. Its first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def html(rows: Sequence[Sequence[str]], caption: str) -> str:
    """Returns a table in HTML, which a notebook shows. Its first row is the header, and the caption
    stands below it."""
    header, *body = rows
    cells = [[f"<td>{escape(cell)}</td>" for cell in row] for row in body]
    lines = [f"<tr>{''.join(row)}</tr>" for row in cells]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    below = f'<caption style="caption-side: bottom">{escape(caption)}</caption>'
    return "\n".join(["<table>", below, f"<thead><tr>{head}</tr></thead>", *lines, "</table>"])
