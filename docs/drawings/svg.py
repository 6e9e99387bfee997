"""A canvas for drawings of boxes, arrows and text, which becomes an SVG file.

Every drawing has a ground of its own, light or dark as the reader's system is, so that its text
can be read on a page of either mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
text { font: 14px system-ui, "DejaVu Sans", sans-serif; fill: #1f2328 }
text.head { font-weight: 600; font-size: 16px }
text.small { font-size: 12px }
text.quiet { fill: #57606a }
text.code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px }
.ground { fill: #ffffff; stroke: #d0d7de }
.box { fill: #f0f2f5; stroke: #8c959f }
.ours { fill: #d7e8fb; stroke: #2f6fb5 }
.cost { fill: #fde3d0; stroke: #c2662d }
.band { fill: #f6f8fa; stroke: none }
.line { stroke: #57606a; stroke-width: 1.3; fill: none }
.dash { stroke: #57606a; stroke-width: 1; stroke-dasharray: 4 3; fill: none }
.tip { fill: #57606a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  text.quiet { fill: #9ea7b3 }
  .ground { fill: #161b22; stroke: #3d444d }
  .box { fill: #2a313c; stroke: #768390 }
  .ours { fill: #1c3a5e; stroke: #6cb0f2 }
  .cost { fill: #5a3218; stroke: #f0a36b }
  .band { fill: #1d242d }
  .line, .dash { stroke: #9ea7b3 }
  .tip { fill: #9ea7b3 }
}
"""


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


class Canvas:
    """Collects the shapes of a drawing. Coordinates are pixels from the upper left corner.

    Args:
        width: the width of the drawing in pixels.
        height: its height in pixels.
        title: what it shows, in words, for readers who do not see it.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []
        self._rectangle(0.5, 0.5, width - 1, height - 1, "ground", 8)

    def _rectangle(
        self, x: float, y: float, width: float, height: float, kind: str, radius: float
    ) -> None:
        at = f'x="{_number(x)}" y="{_number(y)}"'
        size = f'width="{_number(width)}" height="{_number(height)}"'
        self.shapes.append(f'<rect class="{kind}" {at} {size} rx="{_number(radius)}"/>')

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Writes a line of text whose foot is at `y`. `anchor` is start, middle or end."""
        at = f'x="{_number(x)}" y="{_number(y)}" text-anchor="{anchor}"'
        self.shapes.append(f'<text class="{kind}" {at}>{escape(text)}</text>')

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        lines: str | Sequence[str] = (),
        kind: str = "box",
        text: str = "",
        radius: float = 4,
    ) -> None:
        """Draws a box with lines of text in its middle."""
        self._rectangle(x, y, width, height, kind, radius)
        lines = [lines] if isinstance(lines, str) else lines
        first = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for i, line in enumerate(lines):
            self.text(x + width / 2, first + 18 * i, line, text, "middle")

    def line(self, points: Sequence[tuple[float, float]], kind: str = "line") -> None:
        """Draws a line through points."""
        path = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self.shapes.append(f'<polyline class="{kind}" points="{path}"/>')

    def arrow(self, *points: tuple[float, float], kind: str = "line") -> None:
        """Draws a line through points, with a tip at its end."""
        self.line(points, kind)
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = 7 * (x1 - x0) / length, 7 * (y1 - y0) / length
        tip = [(x1, y1), (x1 - dx - dy / 2, y1 - dy + dx / 2), (x1 - dx + dy / 2, y1 - dy - dx / 2)]
        path = " ".join(f"{_number(x)},{_number(y)}" for x, y in tip)
        self.shapes.append(f'<polygon class="tip" points="{path}"/>')

    def svg(self) -> str:
        """Returns the file."""
        size = f"{_number(self.width)} {_number(self.height)}"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img"'
        head += f' width="{_number(self.width)}" height="{_number(self.height)}">'
        title = f"<title>{escape(self.title)}</title>"
        return "\n".join([head, title, f"<style>{STYLE}</style>", *self.shapes, "</svg>\n"])
