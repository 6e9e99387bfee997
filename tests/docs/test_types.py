"""Type checkers see what the package takes and returns."""

import ast
import inspect
import re
import shutil
import sys
import typing
from pathlib import Path

import pytest
from torch import nn

import wn_kernels
from tests.docs.conftest import run

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parent.parent.parent
LAYERS = [name for name in wn_kernels.__all__ if name[:2] == "WN" and hasattr(nn, name[2:])]


def declared(kind):
    """The parameters of the constructor that type checkers see, as Python reads them."""
    for cls in kind.__mro__:
        (body,) = ast.parse(inspect.getsource(cls)).body
        for block in body.body:
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
                (constructor,) = block.body
                constructor.returns = None
                names: dict = {}
                exec("from __future__ import annotations\n" + ast.unparse(constructor), names)
                return list(inspect.signature(names["__init__"]).parameters.values())[1:]
    raise AssertionError(f"{kind.__name__} declares no constructor")


def of_torch(kind):
    """The parameters of torch.nn's own constructor. Recurrent layers declare theirs as an
    overload."""
    constructor = kind.__init__
    if issubclass(kind, nn.RNNBase):
        if sys.version_info < (3, 11):
            pytest.skip("Python 3.10 does not keep overloads")
        constructor = typing.get_overloads(constructor)[0]
    return list(inspect.signature(constructor).parameters.values())[1:]


@pytest.mark.parametrize("name", LAYERS)
def test_the_declared_constructor_is_that_of_torch(name):
    """It has the same names, order and defaults, and then the options that our layers add."""
    ours, theirs = getattr(wn_kernels, name), getattr(nn, name[2:])
    wanted = [*of_torch(theirs), *ours._options]
    assert [(p.name, p.kind, p.default) for p in declared(ours)] == [
        (p.name, p.kind, p.default) for p in wanted
    ]


def test_every_layer_is_tried():
    assert len(LAYERS) == 20


def mypy(python, program):
    cache = ROOT / ".mypy_cache" / "user"  # torch takes a minute, once
    command = sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", cache
    return *command, "--python-executable", python, program


def pyright(python, program):
    pytest.importorskip("basedpyright")
    return sys.executable, "-m", "basedpyright", "--pythonpath", python, program


@pytest.mark.current
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_program_of_a_user(checker, environment, tmp_path):
    """A strict checker accepts it, and reports each of the mistakes in another on its line."""
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    for program in PROGRAMS.glob("*.py"):
        shutil.copy(program, tmp_path)
    python = environment / "python"
    run(*checker(python, "right.py"), cwd=tmp_path)
    with pytest.raises(AssertionError) as found:
        run(*checker(python, "wrong.py"), cwd=tmp_path)
    lines = {int(line) for line in re.findall(r"wrong\.py:(\d+):.*error", str(found.value))}
    statements = ast.parse((PROGRAMS / "wrong.py").read_text("utf-8")).body
    assert lines == {s.lineno for s in statements[1:] if isinstance(s, ast.Expr)}
