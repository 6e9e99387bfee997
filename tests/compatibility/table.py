"""What works with a weight-normed linear layer: PyTorch's two forms and ours, found by trying.

    python -m tests.compatibility.table          # writes docs/compatibility.md

`test_table.py` runs all rows. Every one of ours has to pass, and the committed page to say what was
found.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from tests.compatibility import rows_compiled, rows_layers, rows_processes  # noqa: F401
from tests.compatibility.rows import PROVIDERS, ROWS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def outcome(title: str, provider: str) -> str:
    """What comes of a row: "yes", "wrong", or "fails"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ROWS[title](PROVIDERS[provider])
        except AssertionError:
            return "wrong"
        except Exception as error:
            return "wrong" if "AssertionError: result: relative" in str(error) else "fails"
    return "yes"


def line_of(title: str) -> str:
    """A line of the table, by trying."""
    return f"| {title} | " + " | ".join(outcome(title, name) for name in PROVIDERS) + " |"


def page() -> str:
    """The table, by trying everything."""
    lines = [
        "# Compatibility",
        "",
        "This page says what of PyTorch works with a weight-normed `nn.Linear` on a CPU. Every",
        "cell is what a test found, and `python -m tests.compatibility.table` writes the page.",
        "*fails* is an exception, and *wrong* a result that is not the float64 reference's.",
        f"The table was made with torch {torch.__version__.split('+')[0]}.",
        "",
        "| | " + " | ".join(PROVIDERS) + " |",
        "|---|" + "---|" * len(PROVIDERS),
    ]
    for title in ROWS:
        lines.append(line_of(title))
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
