"""Tables in plain text and in HTML, and the reports that a notebook shows."""

import io
import pickle
import sys
import types
import xml.etree.ElementTree as ElementTree

import torch

import wn_kernels
from wn_kernels.text import aligned, html, progress

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


def model_of_two():
    plain = torch.nn.Linear(4, 3)
    return torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(plain))


def reports(model):
    batch = torch.randn(8, 4)
    watch = wn_kernels.monitor(model)
    watch.record(0.1)
    yield wn_kernels.fuse(model)
    yield wn_kernels.tune(model, batch, seconds=0.01)
    yield wn_kernels.init.data_dependent_(model, batch)
    yield watch


def test_reports_in_a_notebook(own_table):
    """They show the cells of their text, and its line above or below them."""
    for report in reports(model_of_two()):
        table = report._repr_html_()
        lines = aligned(cells(table))
        caption = ElementTree.fromstring(table).findtext("caption")
        assert str(report).splitlines() in (lines, [*lines, caption], [caption, *lines])
        assert len(cells(table)) == 2


def test_an_explanation_in_a_notebook():
    """It has a table for each call, and all of its text."""
    model = torch.nn.Sequential(wn_kernels.WNLinear(4, 6), wn_kernels.WNLSTM(6, 3))
    with wn_kernels.use_backend("aten"):
        found = wn_kernels.explain(model, (5, 4))
    tree = ElementTree.fromstring(found._repr_html_())
    tables = tree.findall("table")
    assert len(tables) == len(found.calls) == 2
    shown = " ".join(tree.itertext()).split()
    assert shown == [word for word in found.split() if set(word) != {"-"}]
    copied = pickle.loads(pickle.dumps(found))
    assert copied == found
    assert copied._repr_html_() == found._repr_html_()


def test_layers_in_a_notebook():
    layer = wn_kernels.WNConv1d(4, 6, 3, dim=None, bias=False)
    layer.weight_g.requires_grad_(False)
    header, *rows = cells(layer._repr_html_())
    assert header == ["parameter", "shape", "dtype", "device", "trained"]
    assert sorted(rows) == [
        ["weight_g", "one number", "float32", "cpu", "no"],
        ["weight_v", "6×4×3", "float32", "cpu", "yes"],
    ]
    assert ElementTree.fromstring(layer._repr_html_()).findtext("caption") == repr(layer)
    lazy = wn_kernels.WNLazyLinear(3)._repr_html_()
    assert {row[1] for row in cells(lazy)[1:]} == {"not known yet"}


class Watched(io.StringIO):
    """A stream that may be a terminal."""

    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


class OutStream(Watched):
    """A stream as ipykernel has it."""

    __module__ = "ipykernel.iostream"


class DisplayHandle:
    """Records what IPython shows, in order."""

    shown = None  # a list, where a test sets one

    def display(self, data, raw):
        assert raw
        self.shown.append(data["text/plain"])

    update = display


def test_progress_is_shown_and_blanked(monkeypatch):
    stream = Watched(True)
    monkeypatch.setattr("sys.stderr", stream)
    assert [*progress("ab", "item")] == ["a", "b"]
    assert stream.getvalue() == "\ritem 1 of 2\ritem 2 of 2\r           \r"


def test_progress_in_a_notebook(monkeypatch):
    """The line is an output of its own. Nothing is left on standard error, which a saved notebook
    would keep."""
    stream = OutStream(False)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(DisplayHandle, "shown", [])
    names = {"IPython": {}, "IPython.display": {"DisplayHandle": DisplayHandle}}
    for name, attributes in names.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    assert [*progress("ab", "item")] == ["a", "b"]
    assert DisplayHandle.shown == ["", "item 1 of 2", "item 2 of 2", ""]
    assert not stream.getvalue()


def test_progress_is_silent_elsewhere(monkeypatch):
    stream = Watched(False)
    monkeypatch.setattr("sys.stderr", stream)
    assert [*progress("ab", "item")] == ["a", "b"]
    assert not stream.getvalue()
