"""The tables of errors: what they show holds, and they reach their page."""

import math

import pytest
import torch

from bench import cli, errors
from bench.cases import Case

SMALL = [Case("small", "Linear", (33, 17), (5, 33), "train")]


def test_ours_is_as_right_as_pytorch():
    """Every result of ours is within twice PyTorch's error and two roundings of the dtype."""
    for dtype in errors.DTYPES:
        case = errors.replace(SMALL[0], dtype=dtype)
        theirs, ours = errors.errors_of(case, "eager"), errors.errors_of(case, "ours")
        assert list(ours) == ["y", "dX", "db", "dV", "dg"]
        for what, found in ours.items():
            assert 0 < found <= 2 * theirs[what] + 2 * torch.finfo(getattr(torch, dtype)).eps, what


def test_weights_at_the_edges():
    """Ours is right for each of them, and PyTorch's is not for three."""
    table = {row[0]: row[1:] for row in errors.weight_rows()[1:]}
    assert len(table) == len(list(errors.weights())) == 5
    for what, (_, ours) in table.items():
        assert float(ours) < 1e-3 if "float16" in what else float(ours) < 1e-6
    assert sum(not float(theirs) < 0.5 for theirs, _ in table.values()) == 3


def test_an_error_of_zeros():
    expected = torch.ones(3, dtype=torch.float64)
    assert errors.error(torch.zeros(3), expected) == 1
    assert math.isnan(errors.error(torch.full((3,), float("nan")), expected))
    with pytest.raises(ValueError, match="zero"):
        errors.error(torch.ones(3), 0 * expected)


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors, "CASES", SMALL)
    assert cli.main(["errors"]) == 0
    assert "| small | float16 |" in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text("\n".join(["before", *errors.MARKS, "after"]))
    assert errors.main(True, page) == 0
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after")
    assert "| small | float32 |" in text
    page.write_text("no marks")
    assert errors.main(True, page) == 1


def test_the_committed_page_has_the_tables():
    text = errors.PAGE.read_text("utf-8")
    start, end = errors.MARKS
    table = text[text.index(start) : text.index(end)]
    for case in errors.CASES:
        for dtype in errors.DTYPES:
            assert f"| {case.label} | {dtype} |" in table
    for what, _ in errors.weights():
        assert f"| {what} |" in table
