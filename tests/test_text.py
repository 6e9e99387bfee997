"""Tables in plain text and in HTML, and the reports that a notebook shows."""

import xml.etree.ElementTree as ElementTree

import torch

import wn_kernels
from wn_kernels.text import aligned, html

ROWS = [("layer", "shape"), ("a & <b>", "3×4"), ("c", "")]


def cells(table):
    """The rows of a table in HTML, as texts."""
    tree = ElementTree.fromstring(table)
    return [[cell.text or "" for cell in row] for row in tree.iter("tr")]


def test_html_has_the_same_cells():
    assert cells(html(ROWS, "two")) == [list(row) for row in ROWS]
    assert ElementTree.fromstring(html(ROWS, "1 < 2")).find("caption").text == "1 < 2"


def test_aligned():
    assert aligned(ROWS) == ["layer    shape", "-------  -----", "a & <b>  3×4", "c"]


def test_reports_in_a_notebook(own_table):
    """Those of `fuse` and of `tune` show the cells and the summary of their text."""
    plain = torch.nn.Linear(4, 3)
    model = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(plain))
    for report in (wn_kernels.fuse(model), wn_kernels.tune(model, torch.ones(2, 4), seconds=0.01)):
        *lines, summary = str(report).splitlines()
        table = report._repr_html_()
        assert aligned(cells(table)) == lines
        assert ElementTree.fromstring(table).find("caption").text == summary
        assert len(cells(table)) == 1 + len(report) == 2
