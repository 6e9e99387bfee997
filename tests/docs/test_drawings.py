"""The committed drawings are those that `python -m docs.drawings` makes."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from docs.drawings.__main__ import DRAWINGS, FIGURES
from docs.drawings.imports import edges
from tests.test_imports import LAYERS

# About how many pixels a character takes, by the kind of text.
SIZES = {"head": 16 * 0.6, "small": 12 * 0.56, "code": 13 * 0.61}

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_committed_drawing_is_current(name):
    drawn = DRAWINGS[name]().svg()
    committed = (FIGURES / f"{name}.svg").read_text("utf-8")
    assert committed == drawn, "`python -m docs.drawings` writes the drawings anew"


def test_every_drawing_is_shown():
    """It stands on a page, and no page shows one that does not exist."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = re.findall(
        r"!\[[^\]]*\]\([^)]*figures/([^)]+)\.svg\)", "\n".join(map(Path.read_text, pages))
    )
    assert set(shown) == set(DRAWINGS) == {path.stem for path in FIGURES.glob("*")}


@pytest.mark.parametrize("name", DRAWINGS)
def test_text_stays_inside(name):
    """No line of text is wider than the drawing leaves it."""
    canvas = DRAWINGS[name]()
    assert canvas.title
    texts = [e for e in ElementTree.fromstring(canvas.svg()).iter() if e.tag.endswith("}text")]
    assert texts
    for text in texts:
        kinds = text.get("class").split()
        size = next((SIZES[kind] for kind in kinds if kind in SIZES), 14 * 0.56)
        width = size * len(text.text)
        before = {"start": 0.0, "middle": width / 2, "end": width}[text.get("text-anchor")]
        x = float(text.get("x"))
        assert 0 <= x - before <= canvas.width - width, text.text
        assert 0 < float(text.get("y")) < canvas.height


def test_the_diagram_has_every_module():
    """The test of the storeys lists the same modules, and each arrow of the diagram runs down."""
    graph = edges()
    assert set(graph) == set(LAYERS)
    for name, targets in graph.items():
        for target in targets:
            assert LAYERS.index(name) < LAYERS.index(target)
